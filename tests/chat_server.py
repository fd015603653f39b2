"""A real HTTP server on this machine that speaks the chat protocol, and can be told to misbehave.

with ChatServer(lambda request: "an answer") as server:
    server.url, server.requests
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CLOSE, HANG = "close the connection", "say nothing"


class ChatServer:
    """Answers each request by `answer(request)`: text; (status, message); bytes, sent as they are; `CLOSE` or `HANG`.

    `requests` are the bodies of all that came, with the key that they were sent with. Functions see one request at a time.
    """

    def __init__(self, answer):
        self.answer, self.requests, self.over, self.lock = answer, [], threading.Event(), threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                owner.handle(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append(body | {"key": handler.headers["Authorization"]})
            told = self.answer(body) if handler.path == "/v1/chat/completions" else (404, f"no {handler.path} here")
        if told is HANG:
            self.over.wait(30)
        if told in (CLOSE, HANG):
            handler.close_connection = True
            return
        status, kind = 200, "application/json"
        if isinstance(told, bytes):
            sent, kind = told, "application/json" if told.startswith(b"{") else "text/html"
        elif isinstance(told, tuple):
            status, message = told
            sent = json.dumps({"error": {"message": message, "type": "error"}}).encode()
        else:
            sent = completion(told)
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(sent)))
        handler.send_header("retry-after-ms", "5")  # else the client waits half a second
        handler.end_headers()
        handler.wfile.write(sent)


def completion(text, finish_reason="stop"):
    """The body of an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(whole).encode()


def asked(request):
    """The text of the last message of a request."""
    return request["messages"][-1]["content"]
