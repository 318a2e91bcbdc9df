"""Run folders that something happened to between two legs of a run: recovered to the last digit, or refused in one line.

The runs are real and take a second each: a ViT of a few thousand parameters on images of 8 pixels.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import synthetic

from nfnet_lib import PROJECT, loader, program, records, sources, train
from nfnet_lib.checkpoint import Checkpoints, not_finite
from nfnet_lib.config import ConfigError, PretrainConfig
from nfnet_lib.data import Quarantine
from nfnet_lib.files import write_json
from nfnet_lib.loader import LoaderError, train_batches
from nfnet_lib.records import RecordError, read_summary, sealed
from nfnet_lib.sampler import ExactlyOnceSampler
from nfnet_lib.train import NonFiniteLoss, Stopped, run

TIMES = (
    "seconds", "wall_seconds", "compile_seconds", "images_per_second", "core_hours", "started_at", "finished_at",
    "data_wait_seconds", "metrics_digest", "digest",  # digests are of times, too
)  # fmt: skip
TINY = {
    "variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002, "num_classes": 4, "image_size": 8, "resolution": 8,
    "eval_resolution": 8, "examples_per_epoch": 32, "heldout_examples": 8, "batch_size": 4, "checkpoints": 4,
}  # 8 steps, checkpoints after 2, 4 and 6  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, folder of its undisturbed run, folder of one that ended after the checkpoint of step 4)."""
    folder, config = tmp_path_factory.mktemp("resume"), PretrainConfig(**TINY)
    run(config, folder / "whole", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        ending_after(patch, 4)
        with pytest.raises(Stopped):
            run(config, folder / "half", progress=False)
    return config, folder / "whole", folder / "half"


def ending_after(patch, step):
    """Let runs end when the checkpoint of this step is on disk."""
    original = Checkpoints.save

    def save(self, number, *arguments):
        original(self, number, *arguments)
        if number == step:
            self.close()
            raise Stopped

    patch.setattr(Checkpoints, "save", save)


@pytest.fixture
def half(made, tmp_path):
    """A copy of the run that ended half-way."""
    return Path(shutil.copytree(made[2], tmp_path / "half"))


def results(folder):
    """What a run recorded, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        {key: value for key, value in read_summary(folder).items() if key not in TIMES},
        [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines],
    )


def refused(config, folder, capsys, words):
    """The command refuses the folder with exit code 2 and one line that has these words, and changes nothing in it."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    params = folder.parent / "refused.json"
    params.write_text(json.dumps(config.model_dump(mode="json")))
    assert train.main([str(params), "--out", str(folder)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line, line
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path.name for path in before.keys() ^ after.keys()} <= {"params.json"} and before.items() <= after.items()


# -------------------------------------------------------------------------------------------------------- checkpoints


def record_of(checkpoint):
    (path,) = (path for path in checkpoint.rglob("metadata") if path.parent.name == "record")
    return path, json.loads(path.read_text())


def rewritten(checkpoint, **changes):
    """Its record with other values and a digest that fits: what another version, or another run, would have written."""
    path, about = record_of(checkpoint)
    path.write_text(json.dumps(sealed({key: value for key, value in (about | changes).items() if value is not None})))


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def digit_changed(checkpoint):
    path, about = record_of(checkpoint)
    about["record"]["data"]["consumed"] += 1
    path.write_text(json.dumps(about))


def older_copied_over(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("2"), checkpoint)


def file_in_place(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.write_text("a file where a folder must be")


CHECKPOINTS = {  # what is done to the newest checkpoint, what is said
    "bits flipped": (lambda c: flip(largest(c / "state")), "checkpoint 4 in half can't be used"),
    "truncated": (lambda c: largest(c / "state").write_bytes(b""), "checkpoint 4 in half can't be used"),
    "a file missing": (lambda c: largest(c / "state").unlink(), "checkpoint 4 in half can't be used"),
    "emptied": (lambda c: [shutil.rmtree(c), c.mkdir()], "checkpoint 4 in half can't be used"),
    "record torn": (lambda c: record_of(c)[0].write_text('{"schema": 2, '), "checkpoint 4 in half can't be used"),
    "position changed": (digit_changed, "its record has been changed"),
    "of another variant": (
        lambda c: rewritten(c, run=record_of(c)[1]["run"] | {"variant": "F0-mini"}),
        "it is of another run: variant was 'F0-mini', now 'Ti/4-mini'",
    ),
    "of an older schema": (lambda c: rewritten(c, schema=None), "it is of schema 1; this version reads schema 2"),
    "of another step": (older_copied_over, "it is of step 2"),
    "of other types": (
        lambda c: rewritten(c, digests={k: v.replace("float32", "bfloat16") for k, v in record_of(c)[1]["digests"].items()}),
        "leaves differ: .* was bfloat16",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_can_not_be_used_is_told_and_the_one_before_used(name, made, half):
    config, whole, _ = made
    damage, words = CHECKPOINTS[name]
    damage(half / "checkpoints" / "4")
    with pytest.warns(UserWarning, match=words):
        run(config, half, progress=False)
    assert results(half) == results(whole)


def test_a_file_in_a_checkpoint_s_place_is_none(made, half):
    config, whole, _ = made
    file_in_place(half / "checkpoints" / "4")
    run(config, half, progress=False)
    assert results(half) == results(whole)


def test_with_no_sound_checkpoint_a_run_is_refused_not_begun_anew(made, half, capsys):
    for step in ("2", "4"):
        flip(largest(half / "checkpoints" / step / "state"))
    with pytest.warns(UserWarning):
        refused(made[0], half, capsys, "no sound checkpoint among steps [4, 2]")


@pytest.mark.parametrize("change", [{"peak_lr": 0.001}, {"batch_size": 8}, {"variant": "S/4-mini"}, {"data_seed": 1}])
def test_a_folder_without_params_json_never_goes_on_as_another_run(change, made, half, capsys):
    (half / "params.json").unlink()
    ((name, value),) = change.items()
    with pytest.warns(UserWarning):
        refused(PretrainConfig(**{**TINY, **change}), half, capsys, f"it is of another run: {name} was {TINY.get(name, 0)!r}")
    assert value != TINY.get(name)


def test_a_folder_without_params_json_goes_on_as_what_it_was(made, half):
    (half / "params.json").unlink()
    run(made[0], half, progress=False)
    assert results(half) == results(made[1])


def test_a_folder_with_params_json_names_the_parameter_and_both_values(made, half, capsys):
    other = PretrainConfig(**{**TINY, "peak_lr": 0.001})
    refused(other, half, capsys, "peak_lr: 0.001, but half holds a run with 0.002; choose another output folder")


def test_another_mesh_between_two_legs_gives_the_same_losses_and_is_recorded(made, half):
    """One device, then four."""
    command = [sys.executable, "-m", "nfnet_lib.train", str(half / "params.json"), "--out", str(half)]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found, lines), (expected, undisturbed) = results(half), results(made[1])
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in undisturbed], rtol=1e-5)
    assert found["heldout_loss"] == pytest.approx(expected["heldout_loss"], rel=1e-5)
    assert found["changes"] == ["step 4: devices 1 cpu before, 4 cpu now"] and found["device_count"] == 4


def test_data_that_changed_between_two_legs_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 255, (10, 10, 3), np.uint8))
    changes = {"dataset": f"folder:{tmp_path / 'data'}", "heldout_examples": 2, "variant": "Ti/4-mini"}
    config = PretrainConfig(**{**TINY, **changes})
    with pytest.MonkeyPatch.context() as patch:
        ending_after(patch, 4)
        with pytest.raises(Stopped):
            run(config, tmp_path / "run", progress=False)
    for path in (tmp_path / "data").rglob("*.png"):
        cv2.imwrite(str(path), rng.integers(0, 255, (12, 10, 3), np.uint8))
    refused(config, tmp_path / "run", capsys, "drew its examples from other data or in another order; fingerprint: saved")


@pytest.mark.parametrize("what,was", [("jax", "0.0.1"), ("processor", "Z80"), ("cores", "64")])
def test_another_version_or_machine_between_two_legs_is_recorded(made, half, capsys, what, was):
    config, whole, _ = made
    for step in ("2", "4"):
        record = record_of(half / "checkpoints" / step)[1]["record"]
        now = record["environment"][what]
        record["environment"][what] = was
        rewritten(half / "checkpoints" / step, record=record)
    summary = run(config, half, progress=False)
    assert summary["changes"] == [f"step 4: {what} {was} before, {now} now"]
    assert f"note: resumed at step 4: {what} {was} before, {now} now; later digits may differ" in capsys.readouterr().err
    found, expected = results(half), results(whole)
    assert found[0].pop("changes") and found == expected and "changes" not in read_summary(whole)
    assert records.collect(half)["changes"].tolist() == [json.dumps(summary["changes"])]


def test_a_checkpoint_from_before_processors_were_recorded_goes_on_without_a_word(made, half, capsys):
    for step in ("2", "4"):
        record = record_of(half / "checkpoints" / step)[1]["record"]
        del record["environment"]["processor"], record["environment"]["cores"]
        rewritten(half / "checkpoints" / step, record=record)
    assert "changes" not in run(made[0], half, progress=False) and "note:" not in capsys.readouterr().err
    assert results(half) == results(made[1])


# ------------------------------------------------------------------------------------------------------------ records


def without_line(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[1:]))


METRICS = {
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a line lost": without_line,
    "a line twice": lambda path: path.write_bytes(path.read_bytes().splitlines(True)[0] + path.read_bytes()),
    "a digit changed": lambda path: path.write_text(path.read_text().replace('"loss": 1', '"loss": 2', 1)),
    "zeros in the middle": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\n\0\0\0\n", 1)),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_that_a_checkpoint_knows_otherwise_are_refused(name, made, half, capsys):
    METRICS[name](half / "metrics.jsonl")
    refused(made[0], half, capsys, "metrics.jsonl")


FOLDER = {  # what is done to a run's folder, what is said
    "params.json emptied": (lambda f: (f / "params.json").write_text(""), "params.json is damaged"),
    "params.json a list": (lambda f: (f / "params.json").write_text("[]"), "params.json is damaged"),
    "summary.json of no bytes": (lambda f: (f / "summary.json").write_text(""), "summary.json cannot be read as JSON"),
    "summary.json a folder": (lambda f: (f / "summary.json").mkdir(), "summary.json cannot be read as JSON"),
    "checkpoints a file": (
        lambda f: [shutil.rmtree(f / "checkpoints"), (f / "checkpoints").write_text("")],
        "/checkpoints'",
    ),
    "metrics.jsonl a folder": (
        lambda f: [(f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()],
        "/metrics.jsonl'",
    ),
    "STOP a folder": (lambda f: (f / "STOP").mkdir(), "/STOP is a folder"),
    "the lock a folder": (lambda f: [(f / ".lock").unlink(), (f / ".lock").mkdir()], "/.lock'"),
    "quarantine.jsonl not text": (
        lambda f: (f / "quarantine.jsonl").write_bytes(b"\xff\xfe\x00[]\n"),
        "quarantine.jsonl, line 1",
    ),
}


@pytest.mark.parametrize("name", FOLDER)
def test_a_folder_in_disorder_is_one_line(name, made, half, capsys):
    damage, words = FOLDER[name]
    damage(half)
    refused(made[0], half, capsys, words)


def test_every_digit_of_a_record_is_held_by_its_digest(made, tmp_path):
    text = (made[1] / "summary.json").read_text()
    found = 0
    for at in [i for i, letter in enumerate(text) if letter.isdigit()][::7]:
        changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        try:
            if json.loads(changed) == json.loads(text):  # the last of more digits than a float has
                continue
        except ValueError:
            pass
        (tmp_path / "summary.json").write_text(changed)
        with pytest.raises(RecordError, match=r"summary\.json"):
            read_summary(tmp_path)
        found += 1
    assert found > 50


def test_metrics_of_a_finished_run_are_held_by_its_record(made, tmp_path):
    folder = Path(shutil.copytree(made[1], tmp_path / "run"))
    assert len(records.read_metrics(folder)) == 8
    without_line(folder / "metrics.jsonl")
    with pytest.raises(RecordError, match=r"metrics\.jsonl has been changed since the run ended"):
        records.read_metrics(folder)


def test_records_of_the_older_schema_are_read_beside_new_ones(made, tmp_path):
    """Schema 1 had no digest, and its first writers fewer keys."""
    old = {key: value for key, value in read_summary(made[1]).items() if key not in ("digest", "metrics_digest", "changes")}
    for key in ("heldout_ece", "data_wait_seconds", "kept_step", "kept_weights", "process_count"):
        del old[key]
    synthetic.write_runs(tmp_path, [old | {"schema": 1, "run_id": "old"}])
    shutil.copytree(made[1], tmp_path / "new")
    table = records.collect(tmp_path).set_index("path")
    assert table.loc["old", "heldout_loss"] == table.loc["new", "heldout_loss"] and len(table) == 2
    assert np.isnan(table.loc["old", "heldout_ece"]) and table["schema"].tolist().count(1) == 1
    assert records.sentence(read_summary(tmp_path / "old")) == records.sentence(read_summary(tmp_path / "new"))
    assert records.headline(read_summary(tmp_path / "old")).shape == records.headline(read_summary(tmp_path / "new")).shape
    for value in ("NaN", "-Infinity", '"1.0"', "true", "null"):
        text = json.dumps({**old, "heldout_loss": 0.125}).replace("0.125", value, 1)
        (tmp_path / "old" / "summary.json").write_text(text)
        with pytest.raises(RecordError, match=r"old.summary\.json"):
            records.collect(tmp_path)


def test_a_torn_quarantine_is_mended_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    line = json.dumps({"split": "train", "id": 3, "position": 3, "reason": "torn"}) + "\n"
    path.write_text(line + line[:20])
    quarantine = Quarantine(path, 1000, 0.5)
    assert quarantine.ids["train"] == {3} and path.read_text() == line, "what comes next begins on a line of its own"
    for damage in ("\0\0\n", "[]\n", '{"split": "other", "id": 1}\n'):
        path.write_text(line + damage + line)
        with pytest.raises(RecordError, match=r"quarantine\.jsonl, line 2"):
            Quarantine(path, 1000, 0.5)


# ------------------------------------------------------------------------------------------------------------ numbers


def device_that(patch, change, step):
    """Let the step of this number give what `change(state, metrics)` makes of its results, as a broken device would."""
    made, calls = train.programs, []

    def programs(*arguments):
        found = made(*arguments)

        class Step:
            wait = staticmethod(found.step.wait)

            def __call__(self, *arguments):
                calls.append(1)
                state, metrics = found.step(*arguments)
                return change(state, metrics) if len(calls) == step else (state, metrics)

        return found._replace(step=Step())

    patch.setattr(train, "programs", programs)


def poisoned(state, value):
    """The state with one weight that is no number."""
    head = {**state.params["head"], "b": state.params["head"]["b"].at[0].set(value)}
    return state._replace(params={**state.params, "head": head})


NUMBERS = {  # what the device gives, at which step, what is said
    "inf in the loss": (lambda s, m: (s, m | {"loss": np.inf}), 3, "the loss is inf at step 3 of 8"),
    "nan in the gradient": (lambda s, m: (s, m | {"grad_norm": np.nan}), 5, "the norm of the gradient is nan at step 5"),
    "nan in the gradient of the last step": (lambda s, m: (s, m | {"grad_norm": np.nan}), 8, "gradient is nan at step 8"),
    "nan in a parameter when a checkpoint is due": (lambda s, m: (poisoned(s, np.nan), m), 4, "is not finite at step 4"),
    "inf in a parameter after the last step": (lambda s, m: (poisoned(s, np.inf), m), 8, "is not finite at step 8"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_stops_the_run_before_it_is_saved(name, made, tmp_path):
    config, whole, _ = made
    change, step, words = NUMBERS[name]
    with pytest.MonkeyPatch.context() as patch:
        device_that(patch, change, step)
        with pytest.raises(NonFiniteLoss, match=words):
            run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "summary.json").exists()
    run(config, tmp_path / "run", progress=False)
    assert results(tmp_path / "run") == results(whole), "no checkpoint held it"


def test_a_loss_spike_is_recorded_and_bounded(made, tmp_path):
    """Targets of a thousand for once: the loss shows it, clipping keeps the weights where they can recover."""
    config, whole, _ = made
    original, calls = program.Programs.place_batch, []

    def place(self, examples):
        calls.append(1)
        wild = examples._replace(label_weights=examples.label_weights * np.float32(1000)) if len(calls) == 4 else examples
        return original(self, wild)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.Programs, "place_batch", place)
        summary = run(config, tmp_path / "run", progress=False)
    losses = [line["loss"] for line in results(tmp_path / "run")[1]]
    assert losses[3] > 100 * losses[2] and max(losses[4:]) < 3 * losses[2]
    assert summary["heldout_loss"] < 2 * read_summary(whole)["heldout_loss"]


def test_pixels_that_are_no_numbers_are_bad_examples():
    """A source of floats: NaN would become some byte."""

    class Floats:
        name, num_classes, fingerprint = "floats", 4, "floats"

        def __len__(self):
            return 20

        def __getitem__(self, index):
            pixels = np.full((12, 12, 3), 7, np.uint8)
            return (pixels * np.float32("nan") if index == 7 else pixels), index % 4

    options = {"batch_size": 20, "resolution": 8, "seed": 0, "workers": 0}
    batch = next(train_batches(Floats(), ExactlyOnceSampler(20, 0), **options))
    ((index, _, reason),) = batch.bad
    assert (index, batch.weights.sum(), reason) == (7, 19, "pixels are float32 [12, 12, 3]; expected uint8 [H, W, 3]")
    with pytest.raises(LoaderError, match=r"example 7 of floats at position \d+: pixels are float32"):
        next(train_batches(Floats(), ExactlyOnceSampler(20, 0), on_bad="stop", **options))


def test_slow_data_change_no_number_and_are_recorded(made, tmp_path, monkeypatch):
    config, whole, _ = made
    original = sources.FractalSource.batch

    def batch(self, ids):
        time.sleep(0.3)
        return original(self, ids)

    monkeypatch.setattr(sources.FractalSource, "batch", batch)
    monkeypatch.setattr(loader, "TOGETHER", (1, 1))  # or all would be read while the step is compiled
    summary = run(config, tmp_path / "run", progress=False)
    assert summary["data_wait_seconds"] > 1 + read_summary(whole)["data_wait_seconds"]
    assert results(tmp_path / "run") == results(whole)


# ---------------------------------------------------------------------------------------------------- parameter files


PARAMETERS = {  # a parameters' file, what is said of it
    "nothing": ("", "holds NoneType, not a mapping"),
    "a list": ("[1]", "holds list, not a mapping"),
    "a key twice": ("seed: 1\nseed: 2\n", "seed stands twice"),
    "a number as a key": ("5: 3\n", "the key 5 is no text"),
    "a list as a key": ("[1, 2]: 3\n", "no plain value"),
    "thousands of digits": ("seed: " + "9" * 5000, "limit"),
    "a huge number": ("seed: " + "9" * 50, "seed: 999"),
    "a negative number": ("batch_size: -3", "batch_size: -3"),
    "not a number": ("peak_lr: .nan", "peak_lr: nan"),
    "infinite": ("epoch_budget: .inf", "epoch_budget: inf"),
    "more than floats hold": ("peak_lr: 1e+999", "peak_lr: "),
    "a truth value": ("batch_size: true", "batch_size: True is a truth value"),
    "nested without end": ("[" * 20_000, "nested too deeply"),
    "an alias in itself": ("variant: &a {x: *a}", "an alias stands for what it is in"),
    "a bomb of aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases stand for more than",
    ),
    "a month that is none": ("variant: 2001-13-41", "is not YAML"),
    "not UTF-8": (b"variant: \xe9", "can't be read"),
    "bytes of zero": (b"variant: \0", "is not YAML"),
    "a lone surrogate": ('{"dataset": "folder:/\\ud800"}', "dataset: "),
    "a path with a zero": ('{"dataset": "folder:/a\\u0000b"}', "dataset: "),
    "a path without end": ('{"dataset": "folder:/' + "a" * 5000 + '"}', "aaaa"),
    "code": ("variant: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_hostile_parameter_files_are_one_line(name, tmp_path, capfd):
    text, words = PARAMETERS[name]
    (tmp_path / "params.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert train.main([str(tmp_path / "params.yaml"), "--out", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "run").exists()


def test_files_without_end_are_not_read(tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("# " + "x" * 2**24)
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "large.yaml", tmp_path):
        assert train.main([str(path), "--out", str(tmp_path / "run")]) == 2
        assert "it is no file of at most 16,777,216 bytes" in capfd.readouterr().err


LISTS = {  # a list of ids not to train on, what is said
    "fractions": ('{"ids": [1.5]', "1.5 is no id"),
    "truth values": ('{"ids": [true]', "True is no id"),
    "negative": ('{"ids": [-1]', "-1 is no id"),
    "huge": (f'{{"ids": [{10**30}]', "is no id"),
    "text": ('{"ids": "123"', "'1' is no id"),
    "hashes that are none": ('{"ids": [1], "hashes": {"1": "x"}', "is not a list of ids"),
    "hashes in a list": ('{"ids": [1], "hashes": [1]', "is not a list of ids"),
    "hashes of another picture": ('{"ids": [1], "hashes": {"1": "0"}', "is for other pictures: example 1"),
    "nothing left": (f'{{"ids": {list(range(32))}', "leaves none of 32 examples"),
    "nested without end": ('{"ids": ' + "[" * 100_000, "is not a list of ids"),
}


@pytest.mark.parametrize("name", LISTS)
def test_hostile_lists_of_ids_are_one_line(name, tmp_path, capfd):
    text, words = LISTS[name]
    (tmp_path / "exclude.json").write_text(text + ', "dataset": "fractals", "split": "train"}')
    write_json(tmp_path / "params.json", {**TINY, "exclude": str(tmp_path / "exclude.json")})
    assert train.main([str(tmp_path / "params.json"), "--out", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: exclude: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", ["999999999999", "1e999", "NaN", "[" * 100_000, '{"label": null}', "9" * 5000])
def test_hostile_labels_in_shards_are_one_line(label, tmp_path, capfd):
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for member, content in (("a.png", picture), ("a.json", label.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    write_json(tmp_path / "params.json", {**TINY, "dataset": f"webdataset:{tmp_path}"})
    assert train.main([str(tmp_path / "params.json"), "--out", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: dataset: ") and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_compiled_programs_that_are_damaged_are_compiled_again(made, tmp_path):
    """Of a shared cache, JAX's and ours: how many there are depends on how long the machine took to compile each."""
    _, whole, _ = made
    command = [sys.executable, "-m", "nfnet_lib.train", str(whole / "params.json"), "--cache-dir", str(tmp_path / "cache")]
    options = {"cwd": PROJECT, "capture_output": True, "text": True, "check": False}
    sound: dict[Path, bytes] = {}
    for name in ("first", "cut", "flipped"):
        for path, content in sound.items():
            path.write_bytes(content if name == "flipped" else content[:99])
            if name == "flipped":
                flip(path)
        done = subprocess.run([*command, "--out", str(tmp_path / name)], **options)
        assert done.returncode == 0, done.stderr
        assert results(tmp_path / name) == results(whole)
        sound = sound or {
            path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.name.endswith(("-cache", ".program"))
        }
        assert {path.suffix for path in sound} == {"", ".program"}


def test_values_may_be_shared_and_merged_in_yaml(tmp_path):
    from nfnet_lib.strict_yaml import parse, read_mapping

    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert read_mapping(tmp_path / "a.yaml", "file") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}] * 2}
    with pytest.raises(ConfigError, match=r"^value is not YAML"):
        parse("[", "value")


def test_not_finite_names_the_leaf():
    tree = {"a": np.zeros(3, np.float32), "b": {"c": np.array([1, np.inf], np.float16)}, "step": np.int32(1)}
    assert not_finite(tree) == "['b']['c']" and not_finite({"a": tree["a"], "step": tree["step"]}) == ""
