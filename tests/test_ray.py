"""A cluster of nodes on one machine: a study across two of them, one killed in the middle, and a TPU slice a run.

The nodes are processes of their own that talk over loopback. The TPU hosts are nodes with the labels and resources of such;
their devices are CPUs.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import kill_study
import pytest

from nfnet_lib import ray_slices
from nfnet_lib.cell import CellFailed
from nfnet_lib.config import ConfigError, PretrainConfig, StudyConfig
from nfnet_lib.study import run_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_TOKEN"] = "a" * 64
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_a_study_across_two_nodes_of_which_one_is_killed(cluster, smallest_study, tmp_path):
    path, undisturbed = smallest_study
    study = StudyConfig.from_file(path)
    shutil.copytree(undisturbed / ".cache", tmp_path / "there" / ".cache")
    second = cluster.add_node(num_cpus=1)
    both_worked = []

    def kill_when_both_work():
        for _ in range(1200):
            time.sleep(0.1)
            locks = [path.read_text().split() for path in (tmp_path / "there").glob("pretrain_*/.lock")]
            if len([lock for lock in locks if lock]) == 2:  # a run is under way on each
                both_worked.append(True)
                break
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_when_both_work)
    killer.start()
    report, failures = run_study(study, tmp_path / "there", engine="ray", address=cluster.address)
    killer.join()
    assert both_worked and not failures and report.exists()
    assert not kill_study.differences(kill_study.records(undisturbed), kill_study.records(tmp_path / "there"))


def tpu_host(cluster, worker):
    """A node like one of the two hosts of a v4:2x2x2 slice."""
    labels = {"ray.io/tpu-slice-name": "slice-0", "ray.io/tpu-pod-type": "v4-16", "ray.io/tpu-topology": "2x2x2"}
    head = {"TPU-v4-16-head": 1} if worker == 0 else {}
    return cluster.add_node(
        num_cpus=1, resources={"TPU": 4} | head, labels=labels | {"ray.io/tpu-worker-id": str(worker)}
    )


def test_one_slice_a_cell(cluster, smallest_study, tmp_path, monkeypatch):
    """Two runs of a search on the two hosts of a slice; in the middle of the first one host is lost, then another comes."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("TPU_NAME", "slice-0")  # as on the hosts of a slice, which have no server of metadata to ask here
    hosts, out = [tpu_host(cluster, worker) for worker in range(2)], tmp_path / "out"
    settings = ("tpu_slice=v4:2x2x2", "epoch_budgets=[1]", "pretrain.examples_per_epoch=512", "retries=1")
    command = [sys.executable, "-m", "nfnet_lib.cli", "study", str(smallest_study[0]), "--out", str(out)]
    command += ["--engine", "ray", "--address", cluster.address, *(word for pair in settings for word in ("-p", pair))]
    study = subprocess.Popen(command)
    for _ in range(1200):
        time.sleep(0.1)
        if any(path.stat().st_size for path in out.glob("pretrain_*/metrics.jsonl")):  # it trains
            break
    assert study.poll() is None and not list(out.glob("*/summary.json"))
    cluster.remove_node(hosts[1], allow_graceful=False)
    tpu_host(cluster, 1)
    assert study.wait() == 0 and not list(out.glob("*/failure.json"))
    summaries = [json.loads(path.read_text()) for path in out.glob("*/summary.json")]
    assert len(summaries) == 2 and all(summary["process_count"] == 2 for summary in summaries)
    (executed,) = out.glob("*_tuned_*/run.ipynb")
    assert "Laptop scale" in executed.read_text() and len(list(out.glob("*/host1.log"))) == 2


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer(address, smallest_study, tmp_path):
    study = StudyConfig.from_file(smallest_study[0])
    with pytest.raises(ConfigError, match=rf"address: '{address}': no Ray cluster answers there: "):
        run_study(study, tmp_path / "out", engine="ray", address=address)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("lost", "times"), [(True, 3), (False, 1)])
def test_a_slice_that_fails(lost, times, tmp_path, monkeypatch):
    """Without a host it is given back for another, as often as `retries` says; what it failed of is kept beside the cell."""
    reserved = []

    @contextlib.contextmanager
    def reserving(tpu_slice):
        reserved.append(tpu_slice)
        yield None

    def train(*_):
        raise CellFailed("a host of the slice was lost", "its log", lost)

    monkeypatch.setattr(ray_slices, "_reserved", reserving)
    monkeypatch.setattr(ray_slices, "_train", train)
    config = PretrainConfig(variant="F0-mini", peak_lr=0.1)
    with pytest.raises(CellFailed):
        ray_slices.on_slice("v4:2x2x2", lambda *_: None, config, tmp_path, lr_grid=(0.1, 0.2), retries=2)
    failure = json.loads((tmp_path / config.cell_id / "failure.json").read_text())
    assert len(reserved) == times and failure["error"] == "a host of the slice was lost" and failure["traceback"] == "its log"
