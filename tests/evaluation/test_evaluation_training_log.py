"""The training log, read back."""

import json

from dpo_keras.evaluation import read_training_log


def test_the_log_keeps_what_can_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"step": 1, "loss": 0.7}),
        json.dumps({"step": 2, "loss": float("nan")}),
        "[1, 2]",
        "",
        json.dumps({"epoch": 1, "step": 2, "loss": 0.7, "val_loss": 0.6}),
        '{"step": 3, "lo',
    ]
    path.write_text("\n".join(lines))
    log = read_training_log(path)
    assert (len(log.steps), len(log.epochs), log.unreadable) == (2, 1, 2)
    assert log.curve("loss")[0].tolist() == [1, 2]
    assert [part.tolist() for part in log.curve("val_loss")] == [[2.0], [0.6]]
    assert log.curve("nothing")[0].tolist() == []
    assert log.broken_step() == 2
