"""In place of the web server that PySocks' tests import: as much of it as they use."""

import collections
import http.server
import threading
import time


class TestServer:
    """What the next answer is like, in `response`; what the last request was like, in `request`."""

    def __init__(self, address, port, engine):
        self.reset()
        self.server = http.server.ThreadingHTTPServer((address, port), type("Page", (Page,), {"test_server": self}))
        self.url = f"http://{address}:{port}/"

    def start(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def reset(self):
        self.request = {}
        self.response = collections.defaultdict(bytes)

    def get_url(self):
        return self.url


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        test_server = self.test_server
        headers = {name.lower(): value for name, value in self.headers.items()}
        test_server.request = {"headers": headers, "client_ip": self.client_address[0]}
        time.sleep(test_server.response["sleep"] or 0)
        body = test_server.response["data"]
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.wfile.write(head.encode() + body)      # in one segment: they read once
