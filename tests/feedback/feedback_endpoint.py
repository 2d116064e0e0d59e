"""A fake OpenAI-compatible endpoint on the loopback, which counts what it is asked."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def letter(asked):
    """Prefer "one …", in whichever place it stands."""
    return "A" if asked["first"].startswith("one") else "B"


def as_json(word):
    return json.dumps({"reason": f"It is {word}.", "better": word})


class Endpoint:
    """`reply(asked, turn)` gives the text, or (status, headers, body); None drops the connection.

    `asked` has the texts of the prompt and of both responses, `turn` counts the times that the same
    question was asked before.
    """

    def __init__(self, reply=lambda asked, turn: as_json(letter(asked)), port=0):
        self.reply = reply
        self.asked = Counter()  # answered questions, by prompt and order
        self.bodies, self.headers = [], []
        self.busy = self.busiest = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):  # noqa: N802, N805
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                asked = texts(body)
                with lock:
                    key = (asked["prompt"], asked["first"])
                    turn = self.asked[key]
                    self.asked[key] += 1
                    self.bodies.append(body)
                    self.headers.append(dict(handler.headers))
                    self.busy += 1
                    self.busiest = max(self.busiest, self.busy)
                given = self.reply(asked, turn)
                with lock:
                    self.busy -= 1
                if given is None:
                    handler.close_connection = True
                    return
                if isinstance(given, str):
                    message = {"role": "assistant", "content": given}
                    given = (200, {}, json.dumps({"choices": [{"message": message}]}))
                status, headers, text = given
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(text.encode())))
                handler.end_headers()
                handler.wfile.write(text.encode())

            def log_message(handler, *words):  # noqa: N805
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def texts(body):
    """Take the prompt and both responses out of a request."""
    content = body["messages"][1]["content"]
    parts = re.findall(r"<(prompt|A|B)-(\w{12})>\n(.*?)\n</\1-\2>", content, re.DOTALL)
    names = {"prompt": "prompt", "A": "first", "B": "second"}
    return {names[name]: text for name, _, text in parts}
