"""The HTTP service: a picture and an instruction in, instances as JSON out. `python -m instructsam.serve` runs it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.datastructures import UploadFile

from instructsam.inference.model import InstructSAM
from instructsam.inference.questions import OutOfMemory, Question
from instructsam.inference.results import Result
from instructsam.inference.selection import check_selection
from instructsam.processing.image_files import load_image
from instructsam.serving.batching import Batcher, Overloaded, Room
from instructsam.serving.docs_page import docs_page
from instructsam.serving.limits import Limits, TooLarge, number
from instructsam.serving.metrics import Metrics
from instructsam.serving.schema import FIELDS, RESPONSES, form_schema
from instructsam.structures import DEFAULT_THRESHOLD

FORM_OVERHEAD = 64 * 1024  # of a request beside its picture
SEGMENT = "/v1/segment"
DECODERS = 2
"""Pictures that are decoded at the same time: each needs several times the memory of its pixels meanwhile."""

_BEARER = HTTPBearer(auto_error=False, description="the token that the service was started with")
_log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that gets an error: its HTTP status and why."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None):
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


@dataclass(frozen=True)
class _Service:
    """What a question passes on its way."""

    batcher: Batcher
    limits: Limits
    room: Room
    decoders: ThreadPoolExecutor


def build_app(
    model: InstructSAM,
    name: str = "InstructSAM",
    limits: Limits | None = None,
    token: str | None = None,
    max_batch: int = 8,
    max_waiting: int = 64,
    max_wait: float = 0.01,
) -> FastAPI:
    """The application.

    Args:
        model: is used by nobody else as long as the application runs.
        name: what /health calls the model.
        limits: of requests; None = the defaults.
        token: requests must bring it (``Authorization: Bearer …``); None = anybody may ask.
        max_batch, max_waiting, max_wait: see `batching.Batcher`.

    Raises:
        ValueError: limits that cannot be; a token that is empty or not of printable ASCII characters.
    """
    limits = limits or Limits()
    expected = None if token is None else _token_bytes(token)
    metrics = Metrics()
    batcher = Batcher(model, max_batch, max_waiting, max_wait, metrics.batch)
    # Threads of their own, not a semaphore: a question that is given up leaves its thread busy for a while.
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
    service = _Service(batcher, limits, Room(limits.waiting_pixels), decoders)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.stop)
        await asyncio.to_thread(decoders.shutdown, cancel_futures=True)

    app = FastAPI(
        title="InstructSAM",
        summary="Segments every instance that an instruction asks for.",
        lifespan=lifespan,
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
    )
    metrics.waiting.set_function(lambda: batcher.waiting)
    metrics.cached.set_function(lambda: len(model.cache))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url)))

    @app.get("/health", responses={503: {"description": "questions are no longer answered"}})
    async def health() -> JSONResponse:
        """Whether questions are answered, and by what."""
        alive = batcher.alive
        device = str(model.predictor.model.device)
        body = {"status": "ok" if alive else "stopped", "model": name, "device": device, "waiting": batcher.waiting}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    form = {"multipart/form-data": {"schema": form_schema(limits)}}
    locks = [] if token is None else [Security(_BEARER)]  # for the description; _check_token asks for the token

    @app.post(
        SEGMENT,
        responses=RESPONSES,
        dependencies=locks,
        openapi_extra={"requestBody": {"required": True, "content": form}},
    )
    async def segment(request: Request) -> JSONResponse:
        """Instances as JSON: phrase, score, box (xyxy in pixels), area, mask (COCO RLE at the picture's size)."""
        began = time.perf_counter()
        headers = None
        try:
            await _check_token(request, expected)
            content, status = await _segment(request, service), 200
        except Refused as error:
            content, status, headers = {"error": error.reason}, error.status, error.headers
        except Exception as error:
            _log.exception("a question failed")
            content, status = {"error": f"the model failed: {error!r}"[:300]}, 500
        metrics.requests.labels(str(status)).inc()
        if status == 200:
            metrics.seconds.observe(time.perf_counter() - began)
            metrics.hits.inc(bool(content["cached"]))
        return JSONResponse(content, status, headers)

    return app


def _token_bytes(token: str) -> bytes:
    token = token.strip()
    if not token:
        raise ValueError("the token is empty")
    if not token.isascii() or not token.isprintable():
        raise ValueError("the token must consist of printable ASCII characters: others do not pass in a header")
    return token.encode()


async def _check_token(request: Request, token: bytes | None) -> None:
    if token is None:
        return
    given = await _BEARER(request)
    if given is None or not hmac.compare_digest(given.credentials.encode(), token):
        raise Refused(401, "a valid token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})


async def _segment(request: Request, service: _Service) -> dict[str, Any]:
    again = {"Retry-After": "1"}
    try:
        service.batcher.admit()
    except Overloaded as error:
        raise Refused(503, f"{error}: try again in a moment", again) from error
    seconds = service.limits.seconds
    try:
        return await asyncio.wait_for(_answer(request, service), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise Refused(504, f"no answer within {seconds:g} seconds") from None
    except (TooLarge, OutOfMemory) as error:  # the same picture again would not fit either: no 503
        raise Refused(413, str(error)) from error
    except Overloaded as error:
        raise Refused(503, str(error), again) from error
    except ValueError as error:
        raise Refused(422, str(error)) from error
    finally:
        service.batcher.release()


async def _answer(request: Request, service: _Service) -> dict[str, Any]:
    limits = service.limits
    values, phrases, content, name = await _read_form(request, limits)
    instruction, said = limits.texts(values.get("instruction"), phrases)
    threshold = number(values, "threshold", float, DEFAULT_THRESHOLD)
    top_k, nms_iou = number(values, "top_k", int, None), number(values, "nms_iou", float, None)
    check_selection(threshold, top_k, nms_iou)
    limits.check_threshold(threshold)
    run = asyncio.get_running_loop().run_in_executor
    opened = await run(service.decoders, limits.opened, content)
    with service.room.hold(opened.width * opened.height):
        image = await run(service.decoders, load_image, opened)
        del content, opened  # the file itself does not wait
        # Texts are checked by the batcher's thread, before anything runs: the tokenizer is for that thread alone.
        prediction, batch_size = await service.batcher.answer(Question(image, instruction, said, threshold))
        result = Result.of(prediction, image, name, instruction)
        found = await asyncio.to_thread(lambda: result.where(top_k=top_k, nms_iou=nms_iou).to_dict())
    meta = prediction.meta
    return {**found, "seconds": meta["seconds"], "cached": meta["cached"], "batch_size": batch_size}


async def _read_form(request: Request, limits: Limits) -> tuple[dict[str, Any], list[str], bytes, str]:
    """Plain fields, phrases, the picture's bytes and its name; nothing beyond the limit is read."""
    most = limits.upload_bytes + FORM_OVERHEAD
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most:
        raise TooLarge(f"the request has {int(announced):,} bytes, more than {most:,}")
    received = 0

    async def counted() -> Any:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise TooLarge(f"the request has more than {most:,} bytes")
        return message

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ValueError("send a form (multipart/form-data) with the fields image and instruction")
    try:
        form = await Request(request.scope, counted).form(max_files=1, max_fields=50)
    except TooLarge:
        raise
    except Exception as error:  # Starlette's own for a form that is none
        raise ValueError(f"the form cannot be read ({getattr(error, 'detail', error)})") from error
    async with _closing(form):
        values = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        phrases = [value for value in form.getlist("phrase") if isinstance(value, str)]
        if unknown := sorted(set(form.keys()) - set(FIELDS)):
            raise ValueError(f"unknown field {unknown[0]!r}, expected {', '.join(FIELDS)}")
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise ValueError("the field image must be a file")
        return values, phrases, await image.read(), image.filename or "image"


@asynccontextmanager
async def _closing(form: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()
