"""The files that describe the environment agree with each other, name no host, and really install."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SUPPORTED_PYTHONS = ["3.11", "3.12", "3.13"]  # the same stand in pyproject.toml's classifiers
# The modules that may import JAX; everything else is analysis, which starts in about a second without it.
JAX_MODULES = {
    *("nfnet", "convolution", "remat", "vit", "models", "pretrained", "big_vision", "weights", "predict"),
    *("agc", "sam", "optim", "losses", "step", "train", "checkpoint", "plan"),
    *("loader", "program", "dedup", "finetune", "distributed", "sharding", "provenance", "selection", "evaluate", "profiling"),
    *("stopping", "program_store", "compiler"),
}


def pins(python: str, platform: str = "linux") -> dict[str, Version]:
    """The versions that constraints.txt fixes for one Python on one platform (x86-64)."""
    system = {"linux": "Linux", "darwin": "Darwin"}[platform]
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
    }
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python} on {platform}"
            found[name] = Version(next(iter(requirement.specifier)).version)
    return found


def pip_lines() -> list[str]:
    """The pip section of environment.yml, one line an item."""
    (section,) = (d["pip"] for d in conda_file()["dependencies"] if isinstance(d, dict))
    return section


def conda_file() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def makefile_extras() -> set[str]:
    (extras,) = re.findall(r"^EXTRAS \?= (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return set(extras.split(","))


def test_constraints_are_versions_and_markers_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.+!]*( ; [^@/:]+)?", line), line


@pytest.mark.parametrize("name", ["constraints.txt", "environment.yml", "pyproject.toml", "Makefile", ".ci/run"])
def test_setup_files_name_no_host(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"://|\bfile:|--(extra-)?index|--find-links|-(index|links)-url [^\\\s-]", text)


@pytest.mark.parametrize("python", SUPPORTED_PYTHONS)
@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_requirement_has_a_satisfying_pin(python, extra):
    fixed = pins(python)
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in fixed, f"{text}: no pin for Python {python}; run `make constraints`"
        assert requirement.specifier.contains(fixed[name], prereleases=True), f"{text}: pinned at {fixed[name]}"


@pytest.mark.parametrize("python", SUPPORTED_PYTHONS)
def test_jax_and_its_plugins_are_pinned_together(python):
    """The resolver's known failure is an old JAX that fits an old plugin: they must be one release."""
    fixed = pins(python)
    assert fixed["jax"] == fixed["jaxlib"] == fixed["jax-cuda13-plugin"] == fixed["jax-cuda13-pjrt"]
    assert fixed["jax"] >= Version("0.10.2")


def test_requirements_have_floors():
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        assert any(clause.operator == ">=" for clause in Requirement(text).specifier), f"{text}: give a lower bound"


def test_supported_pythons_agree():
    classified = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert classified == SUPPORTED_PYTHONS
    required = SpecifierSet(PROJECT["requires-python"])
    assert all(required.contains(python) for python in SUPPORTED_PYTHONS) and not required.contains("3.10")
    (conda_python,) = (d for d in conda_file()["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert conda_python.removeprefix("python=") in SUPPORTED_PYTHONS


def test_conda_installs_what_make_installs():
    constraint_line, editable_line = pip_lines()
    assert constraint_line == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[([a-z,-]+)\]", editable_line)
    assert extras, f"{editable_line!r} is not '-e .[extra,...]'"
    assert set(extras[1].split(",")) == makefile_extras() <= set(EXTRAS)


def test_declared_packages_are_the_packages_of_the_tree():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("nfnet_lib/**/__init__.py")]
    assert sorted(declared) == sorted(found)


def test_package_version_is_the_declared_one():
    tree = ast.parse((ROOT / "nfnet_lib" / "__init__.py").read_text())
    (version,) = (s.value.value for s in tree.body if isinstance(s, ast.Assign) and s.targets[0].id == "__version__")
    assert version == PROJECT["version"]


def test_analysis_imports_neither_jax_nor_tensorflow():
    """Every module outside JAX_MODULES imports where JAX, Flax and TensorFlow do not exist."""
    names = sorted({p.stem for p in ROOT.glob("nfnet_lib/*.py")} - JAX_MODULES - {"__init__", "__main__"})
    program = f"""
import importlib, sys
for missing in ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow"):
    sys.modules[missing] = None  # importing it raises ModuleNotFoundError
failed = []
for name in {names!r}:
    try:
        importlib.import_module("nfnet_lib." + name)
    except ImportError as error:
        failed.append(f"{{name}}: {{error}}")
sys.exit("\\n".join(failed) or None)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pip_section_installs_into_a_fresh_environment(tmp_path):
    """What conda would run, in a new virtual environment: from uv's cache when it is warm, from the index otherwise."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    venv.create(tmp_path / "venv", with_pip=uv is None, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    arguments = [word for line in pip_lines() for word in shlex.split(line)]
    if uv:
        install = [uv, "pip", "install", "--quiet", "--python", python]
        attempts = [[*install, "--offline", *arguments], [*install, *arguments]]
    else:
        attempts = [[python, "-m", "pip", "install", "--quiet", *arguments]]
    for command in attempts:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr

    program = "import sys, nfnet_lib; print(nfnet_lib.__file__, nfnet_lib.__version__, 'jax' in sys.modules)"
    seen = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert seen.stdout.split() == [str(ROOT / "nfnet_lib" / "__init__.py"), PROJECT["version"], "False"]
    assert (tmp_path / "venv" / "bin" / "nfnet").exists(), "the console script was not installed"
