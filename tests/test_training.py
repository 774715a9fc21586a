import pytest
import torch
from torch import nn

from bitnet import BitLinear, Muon, set_strength, strength_at
from bitnet.train.muon import orthogonalize


def test_set_strength_reaches_nested_layers_and_only_them() -> None:
    model = nn.Sequential(BitLinear(4, 4), nn.Sequential(nn.Linear(4, 4), BitLinear(4, 4)))
    set_strength(model, 0.25)
    outer, inner = model[0], model[1][1]
    assert float(outer.strength) == float(inner.strength) == 0.25
    assert not hasattr(model[1][0], "strength")
    set_strength(inner, 1)
    assert (float(outer.strength), float(inner.strength)) == (0.25, 1)


@pytest.mark.parametrize("strength", [0, 1, 0.0, 1.0, True])
def test_the_ends_are_plain_floats_so_that_the_fast_path_is_taken(strength: float) -> None:
    layer = BitLinear(4, 4)
    set_strength(layer, strength)
    assert type(layer.strength) is float
    assert layer.strength == strength


def test_strength_is_not_saved_and_does_not_train() -> None:
    layer = BitLinear(4, 4)
    set_strength(layer, 0.5)
    assert isinstance(layer.strength, torch.Tensor)
    assert not layer.strength.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan"), float("inf")])
def test_strength_outside_its_range_is_refused_and_changes_nothing(strength: float) -> None:
    layer = BitLinear(4, 4)
    with pytest.raises(ValueError, match=rf"strength must lie in \[0, 1\], got {strength}"):
        set_strength(layer, strength)
    assert layer.strength == 1


def test_a_model_without_bit_linear_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no BitLinear layers; call bitnet\.replace_linear"):
        set_strength(nn.Linear(4, 4), 0.5)


@pytest.mark.parametrize(
    ("steps", "start", "end"),
    [(100, 0.5, 0.9), (100, 0.0, 1.0), (7, 0.2, 0.4), (10, 0.5, 0.5), (10, 0, 0), (1, 0.5, 0.9)],
)
def test_schedule_rises_linearly_from_start_to_end(steps: int, start: float, end: float) -> None:
    values = [strength_at(step, steps, start, end) for step in range(steps)]
    assert values == sorted(values)
    assert values[-1] == 1, "training must end on what packing computes"
    for step, value in enumerate(values[:-1]):
        if step < start * steps:
            assert value == 0
        elif step >= end * steps:
            assert value == 1
        else:
            # the difference of two quotients of size 1 loses up to 2^-52, and end - start magnifies it
            assert abs(value - (step - start * steps) / ((end - start) * steps)) <= 4 * 2.0**-52 / (end - start)


def test_defaults_are_those_documented() -> None:
    assert [strength_at(step, 100) for step in (0, 20, 70, 99)] == [0, 0, 1, 1]
    assert abs(strength_at(45, 100) - 0.5) <= 2.0**-50


def test_every_step_of_the_schedule_is_a_valid_strength() -> None:
    layer = BitLinear(4, 4)
    for step in range(30):
        set_strength(layer, strength_at(step, 30))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_no_or_one_step_quantizes_fully(steps: int) -> None:
    assert strength_at(0, steps) == 1


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_a_schedule_that_does_not_rise_within_the_run_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="need 0 <= start <= end <= 1, got"):
        strength_at(0, 10, start, end)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)], ids=str)
def test_orthogonalize_brings_all_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e4])[: shape[0], None, None]
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    along = u.mT @ orthogonalize(matrices) @ vh.mT  # in the singular directions of the input: diagonal again
    after = along.diagonal(dim1=1, dim2=2)
    large = values > values[:, :1] / 20
    assert ((after > 0.6) & (after < 1.25))[large].all()  # where the polynomial keeps values that were not tiny
    assert (along - torch.diag_embed(after)).abs().max() < 1e-3


def test_muon_matches_the_update_size_of_adamw_and_decays_weights() -> None:
    weight = nn.Parameter(torch.randn(24, 96))
    start = weight.detach().clone()
    optimizer = Muon([weight], lr=0.01, weight_decay=0.5)
    weight.grad = torch.randn(24, 96)
    optimizer.step()
    update = (start * (1 - 0.01 * 0.5) - weight.detach()) / 0.01
    rms = update.square().mean().sqrt()
    assert 0.2 * 0.6 < rms < 0.2 * 1.25  # 0.2 times singular values between 0.6 and 1.2


def test_muon_batches_matrices_without_mixing_them() -> None:
    weights = [nn.Parameter(torch.randn(6, 9)) for _ in range(3)]
    alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
    for weight, twin in zip(weights, alone, strict=True):
        weight.grad = torch.randn(6, 9)
        twin.grad = weight.grad.clone()
        Muon([twin]).step()
    Muon(weights).step()
    for weight, twin in zip(weights, alone, strict=True):
        assert torch.allclose(weight, twin, rtol=1e-5, atol=1e-6)  # batched products may sum in another order


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(4))])


def test_muon_takes_a_stack_of_experts_for_one_matrix() -> None:
    stack = nn.Parameter(torch.randn(3, 6, 9))
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    stack.grad = torch.randn(3, 6, 9)
    stack.grad[1] = 0  # an expert that no token has reached
    for twin, grad in zip(alone, stack.grad, strict=True):
        twin.grad = grad.clone()
    Muon(alone).step()
    Muon([stack, nn.Parameter(torch.zeros(3, 6, 9))]).step()
    for matrix, twin in zip(stack, alone, strict=True):
        assert torch.allclose(matrix, twin, rtol=1e-5, atol=1e-6)  # batched products may sum in another order


def test_muon_makes_its_buffers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([weight])
    for step in range(3):
        weight.grad = torch.randn(4, 6)
        optimizer.step()
        if step == 0:
            monkeypatch.setattr(torch, "zeros_like", lambda t: pytest.fail("a buffer was made anew"))
