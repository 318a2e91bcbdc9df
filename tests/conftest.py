"""Settings that must be in place before any test module imports JAX or matplotlib."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest ... runs the same tests on an accelerator
os.environ["MPLBACKEND"] = "Agg"
