"""How far two ways to one number may be apart in tests, and why.

Equal is only what the same code makes of the same numbers in the same shapes: other kernels, batches, threads and
orders of adapters add up in another order. An error is judged against the size of what is compared: ``approx`` with
``abs`` alone and ``rtol=0`` switch that off, and are for numbers whose size is known, such as shares and ratios.
``make test-kernels`` tries the libraries' kernels; errors stay below three tenths of each tolerance under all of them.
"""

from __future__ import annotations

DOUBLE = 1e-9
"""In float64, which rounds at 1e-16: what is tried has factors a thousand times apart on either side (so conditions of
up to a million), and sums of a dozen. :func:`laws.close` says when it is more."""

DIGITS = 1e-12
"""In float64, where nothing is ill-conditioned: some thousand roundings. Absolute: of shares and ratios, of size 1."""

SINGLE = 1e-5
"""In float32, which rounds at 6e-8: sums of a hundred products, a few layers deep, of values of size 1."""

LAYERS = {"rtol": 1e-4, "atol": SINGLE}
"""Outputs of a tiny model in float32, made in two ways: layers amplify the rounding of those before them."""

SCORE = 1e-4
"""Of accuracies and correlations, of size 1, from features in float32; no row is that near to a tie."""
