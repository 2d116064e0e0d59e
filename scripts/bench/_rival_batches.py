"""Runs trl_baseline.py as it is, and writes down the tokens of its first batches.

    python _rival_batches.py BATCHES.json trl_baseline.py run DIR --pairs 64

For the environment that trl_baseline.py describes. `against_trl.py` trains on the same batches.
"""

import json
import pathlib
import runpy
import sys

from trl.trainer import dpo_trainer

COUNT = 8
output, script = pathlib.Path(sys.argv[1]), sys.argv[2]
batches = []
collator = dpo_trainer.DataCollatorForPreference
as_it_is = collator.torch_call


def torch_call(self, examples):
    """Collates as ever, and notes each pair's prompt, chosen and rejected ids."""
    batch = as_it_is(self, examples)
    if len(batches) < COUNT:
        rows = []
        for ids, seen, response in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        ):
            prompt = ids[(seen == 1) & (response == 0)]
            rows.append((prompt.tolist(), ids[response == 1].tolist()))
        half = len(rows) // 2
        pairs = zip(rows[:half], rows[half:], strict=True)
        batches.append([(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in pairs])
        output.write_text(json.dumps(batches))
    return batch


collator.torch_call = torch_call
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
