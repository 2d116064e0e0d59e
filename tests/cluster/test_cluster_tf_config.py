"""TF_CONFIG is understood, or everything that is wrong with it is said at once."""

import json
import re

import pytest

from dpo_keras.app.cli import main
from dpo_keras.cluster import read_tf_config
from dpo_keras.errors import InputError

TWO = {"worker": ["a:7000", "b:7001"]}
FIRST = {"type": "worker", "index": 0}


def text(cluster=None, task=None, **more):
    content = {"cluster": TWO if cluster is None else cluster, "task": task or FIRST, **more}
    return json.dumps(content)


def test_worker_0_is_the_chief_where_there_is_no_other(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text())
    cluster = read_tf_config()
    assert cluster.is_chief and [str(task) for task in cluster.in_step] == [
        "worker 0 (a:7000)",
        "worker 1 (b:7001)",
    ]
    assert not read_tf_config(text(task={"type": "worker", "index": "1"})).is_chief


def test_a_chief_of_its_own_leads_and_other_tasks_take_no_steps():
    jobs = {"ps": ["p:1"], "worker": ["[::1]:7000"], "chief": ["c:2"], "evaluator": ["e:3"]}
    cluster = read_tf_config(text(jobs, environment="cloud"))
    assert str(cluster.chief) == "chief 0 (c:2)" and not cluster.is_chief
    assert [task.type for task in cluster.tasks] == ["chief", "worker", "ps", "evaluator"]
    assert [task.type for task in cluster.in_step] == ["chief", "worker"]
    assert (cluster.this.host, cluster.this.port) == ("::1", 7000)
    assert [task.address for task in cluster.of_type("ps")] == ["p:1"]


@pytest.mark.parametrize("nothing", ["", "  ", "{}"])
def test_no_tf_config_is_no_cluster(nothing):
    assert read_tf_config(nothing) is None


FAULTS = {
    "not JSON": ("{not json", ["must be JSON like", "'{not json'"]),
    "no object": ("[1]", ["must be an object", "[1]"]),
    "no cluster": ('{"task": {"type": "worker", "index": 0}}', ["cluster is missing"]),
    "cluster of another kind": (text(["a:1"]), ["cluster must be an object", "['a:1']"]),
    "no workers": (
        text({"ps": ["a:1"]}, {"type": "ps", "index": 0}),
        ["cluster.worker is missing"],
    ),
    "empty list": (text({**TWO, "ps": []}), ["cluster.ps must be a list of host:port, got []"]),
    "missing address": (
        text({"worker": ["a:1", None]}),
        [r"cluster.worker[1] must be the address of worker 1, got nothing."],
    ),
    "empty address": (text({"worker": ["a:1", ""]}), ["the address of worker 1, got ''"]),
    "no port": (text({"worker": ["host"]}), ["cluster.worker[0] must be host:port, got 'host'"]),
    "bad port": (text({"worker": ["a:x1"]}), ["a port from 1 to 65535, got 'a:x1'"]),
    "port too high": (text({"worker": ["a:70000"]}), ["a port from 1 to 65535"]),
    "twice": (
        text({"worker": ["a:1", "a:1"]}),
        ["cluster.worker[1] is 'a:1', which is cluster.worker[0] already."],
    ),
    "unknown type": (text({**TWO, "wroker": ["c:1"]}), ["unknown type 'wroker'", "chief, worker"]),
    "two chiefs": (
        text({"chief": ["a:1", "b:1"], "worker": ["c:1"]}),
        ["cluster.chief must be one address"],
    ),
    "no task": (json.dumps({"cluster": TWO}), ["task is missing"]),
    "task of no type": (text(task={"index": 0}), ["task.type must be one of worker", "nothing"]),
    "task not in cluster": (text(task={"type": "ps", "index": 0}), ["task.type", "'ps'"]),
    "no index": (text(task={"type": "worker"}), ["task.index must be an integer >= 0"]),
    "negative": (text(task={"type": "worker", "index": -1}), ["task.index", "got -1"]),
    "no number": (text(task={"type": "worker", "index": "one"}), ["task.index", "'one'"]),
    "out of range": (
        text(task={"type": "worker", "index": 2}),
        ["task.index is 2, but cluster.worker has 2 addresses, numbered from 0."],
    ),
    "out of range of one": (
        text({"worker": ["a:1"]}, {"type": "worker", "index": 1}),
        ["task.index is 1, but cluster.worker has 1 address, numbered from 0."],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_what_was_found(fault):
    content, words = FAULTS[fault]
    with pytest.raises(InputError) as error:
        read_tf_config(content)
    assert len(error.value.problems) == 1
    assert [word for word in words if word not in str(error.value)] == []


def test_all_faults_are_named_together():
    with pytest.raises(InputError) as error:
        read_tf_config(text({"worker": ["a:1", "a:1", "b"]}, {"type": "worker", "index": 7}))
    assert [re.search(r"(worker\[\d\]|task.index)", p)[0] for p in error.value.problems] == [
        "worker[1]",
        "worker[2]",
        "task.index",
    ]


@pytest.mark.parametrize("fault", ["not JSON", "missing address", "out of range"])
def test_train_exits_with_2_before_anything_else(fault, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(f"output: {tmp_path / 'run'}\ndata: {{path: 'builtin:support'}}\n")
    content, words = FAULTS[fault]
    monkeypatch.setenv("TF_CONFIG", content)
    monkeypatch.setattr("dpo_keras.app.cli.prepare_keras", lambda: pytest.fail("TensorFlow"))
    assert main(["train", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == 1 and words[0] in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()
