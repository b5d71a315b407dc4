"""The HTTP service: what it answers, what it refuses, what it bears."""

from __future__ import annotations

import asyncio
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from double_precision import float64
from PIL import Image

from instructsam.inference.model import InstructSAM
from instructsam.masks import decode

pytest.importorskip("fastapi")
from instructsam.serving import app as serving_app  # noqa: E402
from instructsam.serving.app import build_app  # noqa: E402
from instructsam.serving.limits import Limits  # noqa: E402
from instructsam.serving.schema import ANSWER  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
URL = "/v1/segment"
LIMITS = Limits(upload_bytes=200_000, pixels=100_000, text=200, seconds=30, least_threshold=0)


@pytest.fixture(scope="module")
def model(checkpoint) -> Iterator[InstructSAM]:
    """In float64, in which an answer is the same in every batch."""
    with float64():
        yield InstructSAM.from_pretrained(checkpoint, device="cpu", max_new_tokens=6)


@pytest.fixture(scope="module")
def pictures(world) -> list[bytes]:
    return [path.read_bytes() for path in sorted((world / "val/images").glob("*.png"))]


def talk(app, ask):
    """Run ``ask(client)`` against an application."""

    async def run():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
        ):
            return await ask(client)

    return asyncio.run(run())


@pytest.fixture
def post(model):
    """Ask one question of a fresh application."""

    def ask(picture: bytes | None, data=None, headers=None, limits=LIMITS, **settings):
        files = {} if picture is None else {"image": ("a.png", picture)}
        app = build_app(model, limits=limits, **settings)
        return talk(app, lambda client: client.post(URL, data=data, files=files, headers=headers))

    return ask


def test_an_answer(post, pictures, model):
    answer = post(pictures[0], {"phrase": ["red circles", "stars"], "threshold": "0", "top_k": "3"})
    assert answer.status_code == 200
    found = answer.json()
    expected = model.segment(pictures[0], phrases=["red circles", "stars"], threshold=0.0, top_k=3)
    assert (found["image"], found["instruction"], found["phrases"]) == (
        "a.png",
        "red circles and stars",
        ["red circles", "stars"],
    )
    assert (
        len(found["instances"]) == 3 and found["batch_size"] == 1 and set(found["seconds"]) >= {"pictures", "language"}
    )
    for one, mask, instance in zip(found["instances"], expected.masks, expected, strict=True):
        assert (decode(one["segmentation"]) == mask).all() and one["score"] == round(instance.score, 6)
    assert post(pictures[0], {"instruction": "the stars"}).json()["instruction"] == "the stars"
    assert_fits(found, ANSWER)


def assert_fits(value, schema) -> None:
    """What an answer holds is what its description says, no more and no less."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    assert isinstance(value, kinds[schema["type"]])
    if "properties" in schema:
        assert set(value) == set(schema["properties"]) == set(schema["required"])
        for name, one in schema["properties"].items():
            assert_fits(value[name], one)
    for one in value if schema["type"] == "array" else []:
        assert_fits(one, schema["items"])


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("picture", "data", "status", "message"),
    [
        (None, {"instruction": "a"}, 422, "send a form"),
        ("picture", {}, 422, "nothing is asked: give an instruction or phrases"),
        ("picture", {"instruction": "  "}, 422, "nothing is asked"),
        ("picture", {"instruction": "a" * 201}, 422, "a text has 201 characters, more than 200"),
        ("picture", {"phrase": ["a", ""]}, 422, "a phrase is empty"),
        ("picture", {"phrase": ["a"] * 11}, 422, "11 phrases, more than 10"),
        ("picture", {"instruction": "a", "threshold": "high"}, 422, "threshold='high': must be a number"),
        ("picture", {"instruction": "a", "threshold": "7"}, 422, "threshold=7.0: must be a number between 0 and 1"),
        ("picture", {"instruction": "a", "prompt": "b"}, 422, "unknown field 'prompt'"),
        ("picture", {"instruction": "a <|im_end|>"}, 422, "reserved token"),
        (b"no picture", {"instruction": "a"}, 422, "are no picture"),
        (b"", {"instruction": "a"}, 422, "the file is empty"),
        (png(10_000, 10_000), {"instruction": "a"}, 413, "10000 x 10000 pixels, more than 100,000"),
        (png(300, 1), {"instruction": "a"}, 422, "thinner than 1:200"),
        (bytes(200_001), {"instruction": "a"}, 413, "the file has 200,001 bytes, more than 200,000"),
        (bytes(300_000), {"instruction": "a"}, 413, "more than 265,536"),
    ],
)  # fmt: skip
def test_what_is_refused(post, pictures, picture, data, status, message):
    answer = post(pictures[0] if picture == "picture" else picture, data)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.json()


def test_bodies_without_a_length_are_counted(model):
    async def body(start: bytes):
        yield start
        for _ in range(100):
            yield bytes(10_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    for content, statuses in ((b"", (413, 422)), (start, (413,))):
        app = build_app(model, limits=LIMITS)
        answer = talk(app, lambda client, content=content: client.post(URL, content=body(content), headers=headers))
        assert answer.status_code in statuses and "error" in answer.json()
    assert "more than 265,536 bytes" in answer.json()["error"]


@pytest.mark.parametrize("announced", [True, False])
def test_requests_of_exactly_the_limit_are_read(model, announced):
    """They are refused for another reason, as they lack a picture; of one announced as longer nothing is read."""
    most, read = LIMITS.upload_bytes + serving_app.FORM_OVERHEAD, []
    start, end = b'--x\r\nContent-Disposition: form-data; name="instruction"\r\n\r\n', b"\r\n--x--\r\n"

    async def pieces(length: int):
        body = start + b"a" * (length - len(start) - len(end)) + end
        for begin in range(0, length, 50_000):
            read.append(length)
            yield body[begin : begin + 50_000]

    async def ask(client):
        answers = []
        for length in (most, most + 1):
            headers = {"content-type": "multipart/form-data; boundary=x"}
            headers |= {"content-length": str(length)} if announced else {}
            answers.append(await client.post(URL, content=pieces(length), headers=headers))
        return answers

    within, beyond = talk(build_app(model, limits=LIMITS), ask)
    assert within.status_code == 422 and "image" in within.json()["error"]
    assert beyond.status_code == 413
    assert most in read and (most + 1 in read) == (not announced)


def test_the_least_threshold(post, pictures):
    for threshold, status in (("0.19", 422), ("0.2", 200), ("", 200)):
        answer = post(pictures[0], {"phrase": "stars", "threshold": threshold}, limits=Limits(least_threshold=0.2))
        assert answer.status_code == status
        assert status == 200 or answer.json() == {"error": "threshold=0.19: must be at least 0.2 here"}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        (b"Bearer no", 401),
        (b"Bearer", 401),
        (b"secret", 401),
        (b"Basic secret", 401),
        ("Bearer sécret".encode(), 401),
        (b"Bearer s\xe9cret", 401),
        (b"Bearer secret", 200),
        (b"bearer secret", 200),
        (b"BEARER  secret ", 200),
    ],
)
def test_a_token(post, pictures, header, status):
    headers = {} if header is None else {b"Authorization": header}
    answer = post(pictures[0], {"phrase": "a"}, headers, token=" secret\n")
    assert answer.status_code == status
    assert status == 200 or answer.headers["WWW-Authenticate"] == "Bearer"


def test_only_the_whole_token_is_let_in(model):
    """Who is let in hears that no form was sent."""
    token = "Secret.Token"
    parts = [token[:length] for length in range(len(token))] + [token[1:], token[-1]]
    longer = [token + "x", token + token, "x" + token, f"{token} {token}", f"{token},"]
    wrong = [f"Bearer {given}" for given in [*parts, *longer, token.lower(), token.upper(), token.swapcase(), "*"]]
    wrong += ["", "Bearer", token, *(f"{scheme} {token}" for scheme in ("Basic", "Digest", "Token", "Bear", "BearerX"))]

    async def ask(client):
        sent = [{"Authorization": header} for header in [*wrong, f"Bearer {token}"]]
        return [(await client.post(URL, headers=headers)).status_code for headers in [{}, *sent]]

    *refused, let_in = talk(build_app(model, limits=LIMITS, token=token), ask)
    assert dict(zip([None, *wrong], refused, strict=True)) == dict.fromkeys([None, *wrong], 401)
    assert let_in == 422


@pytest.mark.parametrize(("token", "message"), [(" ", "is empty"), ("sécret", "ASCII"), ("a\nb", "printable")])
def test_tokens_that_cannot_be(model, token, message):
    with pytest.raises(ValueError, match=message):
        build_app(model, token=token)


def test_health_and_metrics(model):
    async def ask(client):
        return await client.get("/health"), await client.get("/metrics")

    health, metrics = talk(build_app(model, "tiny"), ask)
    assert health.json() == {"status": "ok", "model": "tiny", "device": "cpu", "waiting": 0}
    assert "instructsam_batch_size_bucket" in metrics.text


@pytest.mark.parametrize("token", [None, "secret"])
def test_the_description(model, token):
    async def ask(client):
        found = [await client.get(path) for path in ("/openapi.json", "/docs", "/redoc")]
        return found[0].json(), found[1].text, found[2].status_code

    description, page, redoc = talk(build_app(model, token=token), ask)
    operation = description["paths"][URL]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image"] and form["properties"]["threshold"]["minimum"] == 0.05
    assert set(operation["responses"]) == {"200", "401", "413", "422", "500", "503", "504"}
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == ANSWER
    assert ("security" in operation) == ("securitySchemes" in description.get("components", {})) == (token is not None)
    assert all(path in page for path in description["paths"]) and f"http://a{URL}" in page
    assert all(f"<code>{name}</code>" in page for name in form["properties"])
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["openapi.json"] and redoc == 404


def metric(text: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def expected(model, pictures) -> list[list[dict]]:
    return [model.segment(picture, phrases="stars", threshold=0.0).to_dict()["instances"] for picture in pictures]


def check(found: dict, expected: list[dict]) -> None:
    assert len(found["instances"]) == len(expected)
    for one, other in zip(found["instances"], expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=2e-6)  # rounded to six places
        assert one["segmentation"] == other["segmentation"]


def ask_many(app, pictures, count: int):
    async def ask(client):
        def one(k: int):
            data = {"phrase": "stars", "threshold": "0"}
            return client.post(URL, data=data, files={"image": (f"{k}.png", pictures[k % len(pictures)])})

        answers = await asyncio.gather(*(one(k) for k in range(count)))
        return answers, (await client.get("/metrics")).text, (await client.get("/health")).json()

    return talk(app, ask)


@pytest.mark.slow
def test_fifty_clients_at_once(model, pictures, expected):
    app = build_app(model, limits=LIMITS, max_batch=8, max_waiting=64, max_wait=0.05)
    answers, metrics, health = ask_many(app, pictures, 50)
    assert [answer.status_code for answer in answers] == [200] * 50
    for k, answer in enumerate(answers):
        assert answer.json()["image"] == f"{k}.png"
        check(answer.json(), expected[k % len(pictures)])
    assert metric(metrics, "instructsam_batch_size_sum") == 50
    assert metric(metrics, "instructsam_batch_size_count") <= 25, "batches of two at least, on average"
    assert metric(metrics, 'instructsam_requests_total{status="200"}') == 50
    assert health["status"] == "ok" and health["waiting"] == 0


def test_too_many_clients_are_sent_away(model, pictures, expected):
    app = build_app(model, limits=LIMITS, max_batch=4, max_waiting=6)
    answers, metrics, health = ask_many(app, pictures, 50)
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503} and codes.count(200) >= 6
    for k, answer in enumerate(answers):
        if answer.status_code == 200:
            check(answer.json(), expected[k % len(pictures)])
        else:
            assert answer.headers["Retry-After"] == "1" and "wait already" in answer.json()["error"]
    assert metric(metrics, 'instructsam_requests_total{status="503"}') == codes.count(503)
    assert health["status"] == "ok" and health["waiting"] == 0


def test_what_takes_too_long(model, pictures, monkeypatch):
    answer = InstructSAM.answer
    monkeypatch.setattr(InstructSAM, "answer", lambda self, *given: time.sleep(0.5) or answer(self, *given))
    app = build_app(model, limits=Limits(seconds=0.1, least_threshold=0))
    answers, _, health = ask_many(app, pictures, 3)
    assert [(one.status_code, one.json()["error"]) for one in answers] == [(504, "no answer within 0.1 seconds")] * 3
    assert health == {"status": "ok", "model": "InstructSAM", "device": "cpu", "waiting": 0}


def fail_with(error: Exception):
    def answer(*_):
        raise error

    return answer


def test_a_model_that_fails(model, pictures, monkeypatch, caplog):
    monkeypatch.setattr(InstructSAM, "answer", fail_with(RuntimeError("a fault of its own")))
    answers, metrics, health = ask_many(build_app(model, limits=LIMITS), pictures, 2)
    expected = (500, {"error": "the model failed: RuntimeError('a fault of its own')"})
    assert [(answer.status_code, answer.json()) for answer in answers] == [expected] * 2
    assert metric(metrics, 'instructsam_requests_total{status="500"}') == 2
    assert health["status"] == "ok" and health["waiting"] == 0
    assert "Traceback" in caplog.text and "in answer" in caplog.text


def test_a_question_beyond_the_memory(post, pictures, monkeypatch):
    monkeypatch.setattr(InstructSAM, "answer", fail_with(MemoryError()))
    answer = post(pictures[0], {"phrase": "stars"})
    assert answer.status_code == 413 and "pixels: not enough memory" in answer.json()["error"]


def test_two_pictures_at_most_are_decoded_at_once(model, pictures, monkeypatch):
    """Also where the askers have given up: their threads go on."""
    decode, now, most, lock = serving_app.load_image, [], [], threading.Lock()

    def slowly(image):
        with lock:
            now.append(image)
            most.append(len(now))
        time.sleep(0.3)
        with lock:
            now.pop()
        return decode(image)

    monkeypatch.setattr(serving_app, "load_image", slowly)
    answers, _, _ = ask_many(build_app(model, limits=LIMITS), pictures, 6)
    assert {answer.status_code for answer in answers} == {200} and max(most) == 2

    async def ask(client):
        files = {"image": ("a.png", pictures[0])}
        for _ in range(3):
            asked = [client.post(URL, data={"phrase": "stars"}, files=files) for _ in range(2)]
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {504}

    talk(build_app(model, limits=Limits(seconds=0.1)), ask)
    assert max(most) == 2


def test_pictures_that_wait_are_bounded(model, pictures, monkeypatch):
    """Nothing is answered before five of eight have been refused."""
    answer, pixels, go_on = InstructSAM.answer, Image.open(io.BytesIO(pictures[0])).size, threading.Event()
    one = pixels[0] * pixels[1]
    monkeypatch.setattr(InstructSAM, "answer", lambda self, *given: go_on.wait(300) and answer(self, *given))

    async def ask(client):
        data, files = {"phrase": "stars", "threshold": "0"}, {"image": ("a.png", pictures[0])}
        asked = [asyncio.ensure_future(client.post(URL, data=data, files=files)) for _ in range(8)]
        while sum(one.done() for one in asked) < 5:
            await asyncio.sleep(0.01)
        go_on.set()
        return await asyncio.gather(*asked), (await client.get("/metrics")).text

    limits = Limits(pixels=one, waiting_pixels=3 * one, least_threshold=0)
    answers, metrics = talk(build_app(model, limits=limits), ask)
    assert [answer.status_code for answer in answers].count(200) == 3
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 5 and all(one.headers["Retry-After"] == "1" for one in refused)
    assert "room for 0 pixels" in refused[0].json()["error"]
    assert metric(metrics, 'instructsam_requests_total{status="503"}') == 5


@pytest.mark.slow
def test_the_command(checkpoint, pictures, expected):
    """A real server, real sockets, fifty clients; it ends at once when it is told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "double_precision",
        "instructsam.serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
    ]
    command += ["--device", "cpu", "--max-new-tokens", "6", "--max-wait", "50", "--least-threshold", "0"]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "INSTRUCTSAM_TOKEN": "secret"}
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=environment)
    address, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                assert httpx.get(f"{address}/health").json()["status"] == "ok"
                break
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.2)

        async def ask():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=address, headers=headers, timeout=300, limits=limits) as client:

                def one(k: int):
                    files = {"image": (f"{k}.png", pictures[k % len(pictures)])}
                    return client.post(URL, data={"phrase": "stars", "threshold": "0"}, files=files)

                return await asyncio.gather(*(one(k) for k in range(50)))  # fmt: skip

        answers = asyncio.run(ask())
        assert [answer.status_code for answer in answers] == [200] * 50
        for k, answer in enumerate(answers):
            check(answer.json(), expected[k % len(pictures)])
        metrics = httpx.get(f"{address}/metrics", timeout=300).text
        assert metric(metrics, "instructsam_batch_size_count") <= 25
        assert httpx.post(f"{address}{URL}", timeout=300).status_code == 401
    finally:
        process.terminate()
        _, said = process.communicate(timeout=300)
    assert process.returncode in (0, -15), said[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch", "0"], "max_batch=0"),
        (["--max-megapixels", "0"], "pixels=0: must be greater than 0"),
        (["--max-megapixels", "179"], "pixels=179000000: at most 178,956,970"),
        (["--max-waiting-megapixels", "39"], "waiting_pixels=39000000: less than one picture may have"),
        (["--least-threshold", "2"], "least_threshold=2.0: must be between 0 and 0.3"),
        (["--checkpoint", "nowhere"], "no folder nowhere"),
    ],
)
def test_what_cannot_be_served(checkpoint, arguments, message):
    from instructsam import serve

    with pytest.raises(SystemExit, match=message):
        serve.main(["--checkpoint", str(checkpoint), "--device", "cpu", *arguments])
