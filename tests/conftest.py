import pytest
import torch
from machine import hold

from bitnet.kernels.cpu import library as cpu_library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--isa", help="hold the native kernels to an instruction set (avx2, ...), as on a lesser CPU")
    parser.addoption("--vllm", help="a Python with vLLM and this package, for test_vllm.py, which else makes one")


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected: some are parametrized with the instruction sets there are."""
    held = config.getoption("--isa")
    if held is None:
        return
    try:
        hold(held)
    except ValueError as error:
        raise pytest.UsageError(f"--isa: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    missing = cpu_library.missing(torch.device("cpu"))
    found = missing or ", ".join(dict.fromkeys(cpu_library.isas() + cpu_library.isas(cpu_library.BASE3)))
    return f"native kernels: {found}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
