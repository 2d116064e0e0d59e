"""A process that judges all it is given, and writes a line per confirmed judgement."""

import sys
import uuid
from pathlib import Path

from dpo_keras.feedback import open_store


def main(path, name, log):
    store = open_store(path)
    annotator = next(person.id for person in store.annotators() if person.name == name)
    with Path(log).open("a") as confirmed:
        while shown := store.next(annotator, 2):
            receipt = store.submit(annotator, shown[0].id, "left", key=uuid.uuid4().hex)
            confirmed.write(f"{receipt.judgement}\n")
            confirmed.flush()
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
