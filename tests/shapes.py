"""Matrix shapes that break kernels, as (M, N, K): tokens, out_features, in_features."""

AWKWARD = [
    (0, 8, 16),  # no token
    (1, 1, 1),
    (1, 4, 256),  # decode
    (3, 5, 7),  # nothing divides anything
    (2, 64, 1),
    (17, 1, 33),
    (5, 30, 130),
    (33, 66, 129),
]
REAL = (2, 512, 1536)  # a slice of a real layer
SHAPES = [*AWKWARD, REAL]
