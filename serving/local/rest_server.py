"""HTTP: the REST API, version 1, over `Models`, and the metrics.

Requests are read and answered on an event loop in a thread of its own; predictions, with their JSON, run in a pool.
"""

import asyncio
import contextlib
import logging
import re
import threading
import time
import urllib.parse
import zlib
from concurrent import futures

from aiohttp import HttpVersion10, HttpVersion11, web

from . import metrics, rest_json
from .call import Call
from .errors import ServingError, from_exception

# Each running prediction keeps a thread: many that wait must not keep others from running.
THREADS = 1024
MAX_UNZIPPED = 100 * 2**20  # bytes of a body that comes compressed
MAX_HEADER = 2**20  # bytes of a request line or header

# As the real server's: names as they stand in the path, the case of fixed parts is free.
_API = re.compile(r"/v1/.*", re.IGNORECASE | re.ASCII)
_MODEL = r"([^/:]+)(?:/versions/([0-9]+)|/labels/([^/:]+))?"
_POST = re.compile(rf"/v1/models/{_MODEL}:(predict)", re.IGNORECASE | re.ASCII)
_GET = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:/versions/([0-9]+)|/labels/([^/:]+))?(?:/(metadata))?", re.IGNORECASE | re.ASCII
)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#]*", re.IGNORECASE | re.ASCII)

_HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}

# A client's malformed HTTP is answered, not logged.
_logger = logging.getLogger(f"{__name__}.http")
_logger.setLevel(logging.CRITICAL + 1)


def serve(models, port, timeout_ms, monitoring_path=None, host="0.0.0.0"):
    """Starts the server in the background.

    Args:
        models: `Models`.
        port: the TCP port; 0 takes a free one.
        timeout_ms: how long a prediction may take, in milliseconds; 0 or less means no limit.
        monitoring_path: where the metrics are served, or None.
        host: the address to listen at.

    Returns:
        An object with `port` and `stop(grace_seconds)`, which takes no new requests, gives the running ones that long,
        cancels the rest, and returns when all is over.

    Raises:
        OSError: if the port is taken.
    """
    return _Server(models, port, timeout_ms / 1000 if timeout_ms > 0 else None, monitoring_path, host)


class _Server:
    def __init__(self, models, port, timeout_seconds, monitoring_path, host):
        self._models = models
        self._timeout_seconds = timeout_seconds
        self._monitoring_path = monitoring_path
        self._calls = set()  # of the predictions that run
        self._pool = futures.ThreadPoolExecutor(THREADS, thread_name_prefix="rest")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rest", daemon=True)
        self._thread.start()
        try:
            self._run(self._start(host, port))
        except BaseException:
            self._end()
            raise
        self.port = self._listener.sockets[0].getsockname()[1]

    def stop(self, grace_seconds):
        self._run(self._stop(grace_seconds))
        self._end()

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _start(self, host, port):
        self._http = web.Server(
            self._handle,
            request_factory=_request,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            logger=_logger,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
        )
        self._listener = await self._loop.create_server(self._http, host, port, backlog=1024)

    async def _stop(self, grace_seconds):
        self._listener.close()
        self._http.pre_shutdown()  # connections take no further requests
        cancelling = self._loop.call_later(grace_seconds, self._cancel)
        await self._http.shutdown(grace_seconds + 1)
        cancelling.cancel()

    def _cancel(self):
        for call in list(self._calls):
            call.cancel()

    async def _handle(self, request):
        """Answers one HTTP request."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the response has not begun
        try:
            body = b"".join([chunk async for chunk in request.content.iter_any()])
        except web.RequestPayloadError as error:
            response = _json(rest_json.error_body(f"Malformed request body: {error}"), 400)
            response.force_close()
            return response
        origin = _ORIGIN.match(request.raw_path)
        target = request.raw_path[origin.end() if origin else 0 :]
        if self._monitoring_path and re.split("[?#]", target)[0] == self._monitoring_path:
            return self._metrics(target)
        if not _API.fullmatch(target):
            return web.Response(text="Not Found", status=404)
        try:
            return _json(await self._answer(request, target, body))
        except ServingError as error:
            return _json(rest_json.error_body(error.message), _HTTP_STATUS.get(error.code, 500))

    def _metrics(self, target):
        if target != self._monitoring_path:
            return web.Response(text=f"Unexpected path: {target}. Should be {self._monitoring_path}", status=400)
        return web.Response(text=metrics.exposition())

    async def _answer(self, request, target, body):
        """The body of the answer to a request of the API; raises `ServingError`."""
        if request.method == "POST" and (match := _POST.fullmatch(target)) and match[4] == "predict":
            zipped = "gzip" in request.headers.get("Content-Encoding", "")
            return await self._predict(*_wanted(match), body, zipped)
        if request.method == "GET" and (match := _GET.fullmatch(target)):
            name, version, label = _wanted(match)
            if not name:
                raise ServingError("INVALID_ARGUMENT", "Missing model name in request.")
            if match[4] != "metadata":
                return rest_json.status_body(self._models.status(name, version, label))
            servable = self._models.find(name, version, label)
            return rest_json.metadata_body(servable.name, servable.version, servable.signature_defs)
        raise ServingError("INVALID_ARGUMENT", f"Malformed request: {request.method} {target}")

    async def _predict(self, name, version, label, body, zipped):
        """A prediction in the pool. It ends when it is late or its client gone, even where the graph does not stop."""
        start, code = time.monotonic(), "OK"
        call = Call(self._timeout_seconds)
        work = self._loop.run_in_executor(self._pool, self._work, name, version, label, body, zipped, call)
        work.add_done_callback(lambda work: work.cancelled() or work.exception())  # nobody may be left to see it
        self._calls.add(call)
        try:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(work), call.remaining())
            call.cancel("DEADLINE_EXCEEDED")
            call.check()
        except asyncio.CancelledError:
            code = "CANCELLED"
            call.cancel()
            raise
        except ServingError as error:
            code = error.code
            raise
        finally:
            self._calls.discard(call)
            metrics.record_request(name, "predict", "REST", code, time.monotonic() - start)

    def _work(self, name, version, label, body, zipped, call):
        try:
            document = rest_json.read_document(_unzipped(body) if zipped else body)
            servable = self._models.find(name, version, label)
            signature_name, inputs, in_rows = rest_json.read_inputs(document, servable.signature_defs)
            _, outputs = servable.predict(signature_name, inputs, (), call)
            return rest_json.outputs_body(outputs, in_rows)
        except Exception as error:
            known = from_exception(error)
            if known.code == "INTERNAL":
                logging.exception("%s failed", name)
            raise known from None


def _request(message, *rest):
    # The answer takes its version from here, and there is none but these.
    message = message._replace(version=min(max(message.version, HttpVersion10), HttpVersion11))
    return web.BaseRequest(message, *rest, asyncio.get_running_loop())


def _wanted(match):
    """Name, version and label, or None for each, of a path."""
    name, version, label = match.groups()[:3]
    if version and (len(version.lstrip("0")) > 19 or int(version) >= 2**63):
        raise ServingError("INVALID_ARGUMENT", f"Failed to convert version: {version} to numeric.")
    return _unquoted(name), int(version) if version else None, _unquoted(label)


def _unquoted(text):
    # aiohttp gives bytes that are no UTF-8 as lone surrogates.
    return text and urllib.parse.unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode(errors="replace")


def _unzipped(body):
    """A gzipped body; nothing if it is none, or too long, which then is no JSON, as in the real server."""
    stream = zlib.decompressobj(wbits=31)
    try:
        data = stream.decompress(body, MAX_UNZIPPED)
    except zlib.error:
        return b""
    return data if stream.eof else b""


def _json(body, status=200):
    return web.Response(body=body, status=status, content_type="application/json")
