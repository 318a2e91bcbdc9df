"""Settings that must be in place before any test module imports JAX or matplotlib."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest ... runs the same tests on an accelerator
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # as runs are compiled (program.py): a tenth off

from pathlib import Path

import pytest
from synthetic import finetune_summaries, pretrain_summaries, write_runs

from nfnet_lib.cell import NOTEBOOKS, execute
from nfnet_lib.config import StudyConfig
from nfnet_lib.study import run_study

# They start studies, kill and time them: each wants the whole machine for itself.
ALONE = {"test_browser", "test_engines", "test_faults", "test_profiling", "test_ray", "test_study"}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    """Mark what must run alone; leave out what only `make faults` runs, unless it does."""
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker("alone")
    if os.environ.get("FAULTS") != "long":
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def smallest_study(tmp_path_factory):
    """The file of the smallest study, and the folder of a run of it that nothing disturbed; neither is to be changed."""
    path, out = Path(__file__).parent / "smallest.yaml", tmp_path_factory.mktemp("undisturbed") / "out"
    _, failures = run_study(StudyConfig.from_file(path), out)
    assert not failures
    return path, out


@pytest.fixture(scope="session")
def planted_study(tmp_path_factory):
    """A finished study with a known law, its analysis executed; one of its cells failed, with markup in its error."""
    folder = tmp_path_factory.mktemp("work") / "planted"
    runs = pretrain_summaries(noise=0.01)
    write_runs(folder, [*runs, *finetune_summaries(runs[-4:])])
    for name in ("index", "04_scaling_laws", "05_compare"):
        execute(NOTEBOOKS / f"{name}.ipynb", folder / "analysis" / f"{name}.ipynb", {"study_dir": str(folder)})
    (folder / "broken").mkdir()
    (folder / "broken" / "failure.json").write_text('{"error": "<script>alert(1)</script> | lost", "traceback": ""}')
    return folder
