"""A process in which an endpoint judges a store."""

import sys

from dpo_keras.feedback import open_store
from dpo_keras.feedback.endpoint_judge import EndpointJudge
from dpo_keras.feedback.judges import ask_judge

if __name__ == "__main__":
    store = open_store(sys.argv[1])
    ask_judge(store, EndpointJudge(sys.argv[2], "fake", concurrency=3))
    store.close()
