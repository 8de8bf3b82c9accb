"""`dynllava serve` over real HTTP, as the `openai` client and a browser's closed tab use it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynllava_plugin import load_model
from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.images import open_image
from dynllava_plugin.serve import fetching, request
from dynllava_plugin.serve.fetching import Fetch
from tests.property_tests import TIMES
from tests.server import Server

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

LONG = "Describe the image in detail."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    flags = ("--device", "cpu", "--policy", "full", "--image_urls", "any", "--max_request_mib", "1")
    server = Server("tiny", log, *flags)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny", device="cpu", policy="full")


def boxes(shift: int = 0) -> Image.Image:
    image = Image.new("RGB", (128, 96), "white")
    image.paste((200, 30, 30), (10 + shift, 20, 50 + shift, 70))
    image.paste((30, 30, 200), (70, 50, 110, 90))
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def turn(text: str, *urls: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def ask(client: Any, messages: Any, **more: Any) -> Any:
    settings = {"model": "tiny", "max_tokens": 40, "temperature": 0, **more}
    return client.chat.completions.create(messages=messages, **settings)


def text_of(client: Any, messages: Any, **more: Any) -> str:
    return ask(client, messages, **more).choices[0].message.content


def direct(model: Any, processor: Any, text: str, *images: Image.Image, new: int = 40, **more: Any) -> str:
    """The answer of `generate` to the same conversation."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False, **more)[
        0, inputs["input_ids"].shape[1] :
    ]
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def refused(call: Any, *words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    message = caught.value.body["message"]
    assert "\n" not in message and all(word in message for word in words), message


def test_text_and_images_are_answered_as_generate_answers(client: Any, tiny: Any) -> None:
    assert text_of(client, [{"role": "user", "content": "What is this?"}]) == direct(*tiny, "What is this?")
    image = boxes()
    wanted = direct(*tiny, LONG, image)
    assert len(wanted) > 20
    answer = ask(client, turn(LONG, data_url(image)))
    assert answer.choices[0].message.content == wanted
    assert answer.usage.prompt_tokens > 64 and answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny" == client.models.list().data[0].id == client.models.retrieve("tiny").id
    pieces = list(ask(client, turn(LONG, data_url(image)), stream=True))
    assert len(pieces) > 5
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted


def test_an_image_by_http_url(client: Any, tiny: Any) -> None:
    picture = png(boxes(9))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/boxes.png" else 404)
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *_: Any) -> None: ...

    pictures = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{pictures.server_port}"
    try:
        assert text_of(client, turn(LONG, f"{address}/boxes.png")) == direct(*tiny, LONG, boxes(9))
        refused(lambda: ask(client, turn(LONG, f"{address}/none.png")), "none.png", "404")
    finally:
        pictures.shutdown()
        pictures.server_close()


def test_a_policy_belongs_to_a_request(client: Any, tiny: Any) -> None:
    model, processor = tiny
    images = [boxes(shift) for shift in (0, 6, 12)]
    policies = (None, "fastv,k=1,r=0.97", "random,r=0.95")

    def both(image: Image.Image, policy: str | None) -> tuple[str, str]:
        extra = {} if policy is None else {"policy": policy}
        return text_of(client, turn(LONG, data_url(image)), extra_body=extra), direct(
            model, processor, LONG, image, policy=policy
        )

    with ThreadPoolExecutor(8) as pool:
        given = [pool.submit(both, image, policy) for image in images for policy in policies]
        pairs = [future.result() for future in given]
    assert all(answer == wanted for answer, wanted in pairs)
    by_policy = [[answer for answer, _ in pairs[index::3]] for index in range(3)]
    assert by_policy[0] != by_policy[1] != by_policy[2]


def test_bad_requests_are_one_line(client: Any) -> None:
    good = turn("What is this?")
    refused(
        lambda: ask(client, good, extra_body={"policy": "fastvv"}), "policy: unknown value 'fastvv'", "fastv"
    )
    refused(lambda: ask(client, good, extra_body={"policy": "fastv,k=99"}), "layer 99 is outside the model")
    refused(lambda: ask(client, good, extra_body={"policy": 3}), "policy: 3")
    refused(lambda: ask(client, turn("word " * 3000)), "tokens", "2048", "shorten the text")
    refused(lambda: ask(client, good, max_tokens=5000), "max_tokens 5000", "2048")
    refused(lambda: ask(client, good, max_tokens=0), "max_tokens: 0")
    refused(lambda: ask(client, good, temperature=-1), "temperature: -1")
    refused(lambda: ask(client, good, model="other"), "'tiny'", "'other'")
    refused(lambda: ask(client, turn(LONG, "/etc/hostname")), "data:, http:// or https://")
    refused(
        lambda: ask(client, turn(LONG, "data:image/png;base64,AAAA")),
        "image_url: image data:image/png;base64,AAAA isn't an image",
    )
    refused(lambda: ask(client, []), "messages")
    for name, value, said in (
        ("seed", 2**63, "64 bits"), ("frequency_penalty", -1, "above -1"), ("top_p", 0, "above 0"),
        ("logit_bias", {"647": 1}, "647 tokens"), ("logit_bias", {"-3": 1}, "'-3': 1"), ("logit_bias", {"3": 101}, "100"),
        ("logit_bias", {"3": "nan"}, "'nan'"), ("logit_bias", [3], "an object"), ("n", 2, "not supported"),
        ("logprobs", True, "not supported"), ("presence_penalty", 1, "not supported"),
        ("response_format", {"type": "json_object"}, "not supported"), ("tool_choice", "required", "not supported"),
        ("stream", "yes", "true or false"), ("tools", [{"type": "function", "function": {"name": "f"}}], "chat template"),
    ):  # fmt: skip
        refused(lambda name=name, value=value: ask(client, good, **{name: value}), f"{name}: ", said)
    wrong = ('{"num_beams": 3}', '{"do_sample": true}', '{"max_new_tokens": "4"}', "[]", "{", 4)
    for extra in ({"chat_template_kwargs": "x"}, *({"generation_config": text} for text in wrong)):
        refused(lambda extra=extra: ask(client, good, extra_body=extra), next(iter(extra)))
    refused(lambda: ask(client, good, extra_body={"temprature": 1}), "temprature", "temperature?")
    # A template of the client's own may run for ever; the others would go to the image processor.
    for name, value in (
        ("chat_template", "{{ 1 }}"),
        ("size", {"height": 3, "width": 3}),
        ("tokenize", 1),
        ("messages", []),
    ):
        settings = {"chat_template_kwargs": {name: value}}
        refused(
            lambda settings=settings: ask(client, turn(LONG, data_url(boxes())), extra_body=settings),
            name,
            "chat template",
        )
    large = data_url(Image.new("1", (10_000, 9_000)))
    refused(lambda: ask(client, turn(LONG, large)), "90000000 pixels")
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "seed": -5,
    }
    assert text_of(client, good, logit_bias={"646": -100}, frequency_penalty=0, **neutral)
    refused(lambda: ask(client, [{"role": "user", "content": [{"type": "input_audio"}]}]), "input_audio")
    assert text_of(client, good)


def test_errors_have_one_form(server: Server) -> None:
    """Whatever asks: a body that is no JSON object, a path or a method that isn't there."""
    for path, method, body, status, said in (
        ("/chat/completions", "POST", b"{", 400, "double quotes"), ("/chat/completions", "POST", b"[]", 400, "dictionary"),
        ("/chat/completions", "POST", b"", 400, "required"), ("/chat/completions", "POST", b"\xff", 400, "body"),
        ("/chat/completions", "GET", None, 405, "Method Not Allowed"), ("/completions", "POST", b"{}", 404, "Not Found"),
        ("/models/other", "GET", None, 404, "'other'"),
    ):  # fmt: skip
        asked = urllib.request.Request(
            server.url + path, data=body, method=method, headers={"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(asked, timeout=30)
        error = json.loads(caught.value.read())["error"]
        assert caught.value.code == status and said in error["message"], (path, error)
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health", timeout=30) as answer:
        assert json.loads(answer.read()) == {"status": "ok"}


def test_a_request_that_is_too_large(server: Server, client: Any) -> None:
    """Its length told or not; what is told isn't waited for, and the connection serves the next request."""
    text = "x" * (1 << 20)
    for messages in (turn(text), turn(LONG, "data:image/png;base64," + text)):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, messages)
        assert caught.value.status_code == 413 and caught.value.type == "invalid_request_error"
        assert "more than 1 MiB; send smaller images" in caught.value.body["message"]
    assert text_of(client, turn("What is this?"), max_tokens=1)
    host, port = server.url.split("/")[2].split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    piece = f"{1 << 16:x}\r\n".encode() + b" " * (1 << 16) + b"\r\n"
    for length, sent in (("Content-Length: 1048577", b""), ("Transfer-Encoding: chunked", 17 * piece)):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(f"{head}{length}\r\n\r\n".encode() + sent)
            answer = b""
            while b"}}" not in answer:
                more = raw.recv(1 << 16)
                assert more, answer
                answer += more
            assert (
                answer.startswith(b"HTTP/1.1 413") and b'{"error":{"message":"body: more than 1 MiB' in answer
            )


def test_images_that_are_too_many(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr(request, "MOST_PIXELS", 3 * 128 * 96)
    picture = data_url(boxes())
    request.fetch_images(request.conversation(turn(LONG, *[picture] * 3)), tiny[1], "none")
    with pytest.raises(UserError, match="36864 pixels together"):
        request.fetch_images(request.conversation(turn(LONG, *[picture] * 4)), tiny[1], "none")


def test_a_stream_ends_as_openais(server: Server) -> None:
    body = {"messages": turn("What is this?"), "max_tokens": 3, "temperature": 0, "stream": True}
    asked = urllib.request.Request(
        server.url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        *events, end = [line for line in answer.read().decode().split("\n") if line]
    assert end == "data: [DONE]" and all(json.loads(line.removeprefix("data: ")) for line in events)


def test_the_reason_for_the_end_is_the_answers(client: Any) -> None:
    """An end token or stop text in the last place that was asked for is an end, not a cut."""
    messages = turn(LONG, data_url(boxes()))
    whole = ask(client, messages, max_tokens=300)
    length = whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop" and length > 8
    for most, reason in ((length, "stop"), (length - 1, "length")):
        assert ask(client, messages, max_tokens=most).choices[0].finish_reason == reason
        assert (
            list(ask(client, messages, max_tokens=most, stream=True))[-1].choices[0].finish_reason == reason
        )


def test_hardly_any_temperature_is_none(client: Any) -> None:
    """1e-40 makes every logit infinite: on a GPU such a draw ends the process."""
    messages = turn(LONG, data_url(boxes()))
    wanted = text_of(client, messages)
    for temperature in (1e-40, 1e-7):
        assert text_of(client, messages, temperature=temperature, seed=1) == wanted


def test_an_image_token_in_a_text_is_text(client: Any) -> None:
    plain = ask(client, turn("What is this?", data_url(boxes())))
    written = ask(client, turn("What is <image> this?</s>", data_url(boxes())))
    more = written.usage.prompt_tokens - plain.usage.prompt_tokens
    assert 2 < more < 16  # the letters of "<image>" and "</s>": not 64 tokens of an image, not one
    assert ask(client, turn("What is <image>?")).usage.prompt_tokens < 64


def test_stop_texts_and_sampling(client: Any) -> None:
    messages = turn(LONG, data_url(boxes()))
    whole = text_of(client, messages)
    stop = whole[15:20]
    wanted = whole[: whole.index(stop)]
    answer = ask(client, messages, stop=[stop, "never"])
    assert answer.choices[0].message.content == wanted and answer.choices[0].finish_reason == "stop"
    pieces = ask(client, messages, stop=stop, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    drawn = [text_of(client, messages, temperature=2, seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len({whole, *drawn}) > 2


def test_32_requests_at_once_equal_one_by_one(client: Any) -> None:
    questions = [turn(f"What is in part {n}? {LONG}", data_url(boxes(n))) for n in range(16)]
    questions += [turn(f"Is {n} red?") for n in range(16)]
    alone = [text_of(client, question, max_tokens=12) for question in questions]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda question: text_of(client, question, max_tokens=12), questions))
    assert together == alone


def test_clients_that_leave_free_the_server(client: Any) -> None:
    """Clients that leave wanted 1,900 tokens each, minutes together; the next one doesn't wait for them."""
    endless = {"logit_bias": {"2": -100}, "max_tokens": 1900}
    start = time.perf_counter()
    for _ in range(5):
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.5), turn("Go on."), **endless)
        stream = ask(client, turn("Go on."), stream=True, **endless)
        assert [next(stream) for _ in range(3)]
        stream.close()
    text_of(client, turn("What is this?"))
    assert time.perf_counter() - start < 20


def test_memory_stays_flat(server: Server, client: Any) -> None:
    """200 requests; `DYNLLAVA_FUZZ=5 pytest -s tests/test_serve.py -k memory` makes it 1,000 and says how much it grew."""
    question = turn("What is this?", data_url(boxes()))
    for _ in range(40):
        text_of(client, question, max_tokens=1)
    before = server.resident()
    for _ in range(200 * max(TIMES, 1)):
        text_of(client, question, max_tokens=1)
    grown = server.resident() - before
    print(f"grown by {grown / 2**20:.1f} of {before / 2**20:.0f} MiB")
    assert grown < 8 << 20


def test_another_family(tmp_path: Path) -> None:
    from tests.families.checkpoints import write_checkpoint

    folder = str(write_checkpoint("qwen2_5_vl", tmp_path / "qwen"))
    server = Server(folder, tmp_path / "log", "--device", "cpu", "--policy", "fastv,k=2")
    try:
        client = server.client()
        model, processor = load_model(folder, device="cpu", policy="fastv,k=2")
        answer = ask(client, turn("What is this?", data_url(boxes())), model=folder, max_tokens=8)
        assert answer.choices[0].message.content == direct(model, processor, "What is this?", boxes(), new=8)
        written = ask(client, turn("What is <|image_pad|><|im_end|> this?"), model=folder, max_tokens=2)
        assert written.usage.prompt_tokens > 20
        inside = turn("What?", "http://127.0.0.1:1/x.png")
        refused(lambda: ask(client, inside, model=folder), "image_url", "private address", "--image_urls")
        # An image that the policy can't be had for is that request's own mistake.
        sides = (56, 280, 56, 280)

        def sized(side: int, stream: bool = False) -> Any:
            picture = data_url(Image.new("RGB", (side, side), "red"))
            extra = {"policy": "fastv,k=2,tokens=12"}
            answer = ask(
                client, turn("What?", picture), model=folder, max_tokens=30, stream=stream, extra_body=extra
            )
            return list(answer) if stream else answer.usage.completion_tokens

        with ThreadPoolExecutor(5) as pool:
            busy = pool.submit(ask, client, turn("Go on."), model=folder, max_tokens=60)
            found = [pool.submit(sized, side) for side in sides]
            assert busy.result() and [found[n].result() for n in (0, 2)] == [30, 30]
            for n in (1, 3):
                refused(found[n].result, "tokens=12 of an image's 64")
        with pytest.raises(openai.APIError, match="tokens=12 of an image's 64"):
            sized(280, stream=True)
    finally:
        assert server.stop() == 0


def test_it_starts_with_what_matters_and_ends_quietly(tmp_path: Path) -> None:
    server = Server("tiny", tmp_path / "log", "--device", "cpu", "--policy", "image_text")
    client = server.client()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(text_of, client, turn("Go on."), logit_bias={"2": -100}, max_tokens=1900)
        time.sleep(1)
        assert server.stop() == 0
        with pytest.raises(openai.InternalServerError, match=r"503.*the server ends"):
            waiting.result()
    said, serving = server.text.splitlines()
    assert "has no predictors" in said and re.match(r"serving tiny \(image_text\) at http", serving)


def test_a_stream_that_the_server_cuts_is_an_error(tmp_path: Path) -> None:
    """It isn't an answer that has come to its end."""
    server = Server("tiny", tmp_path / "log", "--device", "cpu", "--policy", "full")
    stream = ask(server.client(), turn("Go on."), logit_bias={"2": -100}, max_tokens=1900, stream=True)
    try:
        assert [next(stream) for _ in range(3)]
    finally:
        server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server ends"):
        list(stream)
    server.process.wait(60)


def test_private_addresses_are_not_fetched() -> None:
    """By number, by name, or behind an address that sends there; and nothing from what isn't HTTP."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header(
                "Location", "ftp://127.0.0.1/x" if self.path == "/ftp" else "file:///etc/hostname"
            )
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    inside = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=inside.serve_forever, daemon=True).start()
    port = inside.server_port
    for url in (
        f"http://127.0.0.1:{port}/",
        f"http://localhost:{port}/",
        f"https://[::1]:{port}/",
        f"http://[::ffff:127.0.0.1]:{port}/",
    ):
        with pytest.raises(UserError, match=r"private address, .*--image_urls any"):
            open_image(url, fetch=Fetch("public"))
    assert not asked
    for url in (f"http://127.0.0.1:{port}/ftp", f"http://127.0.0.1:{port}/file"):
        with pytest.raises(UserError, match=r"ftp|file"):
            open_image(url, fetch=Fetch("any"))
    assert len(asked) == 2
    inside.shutdown()
    inside.server_close()
    with pytest.raises(UserError, match="no image URLs"):
        open_image("http://127.0.0.1/x.png", fetch=Fetch("none"))


def test_an_image_url_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much, or too slowly: a client doesn't decide how much memory and time an address costs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"x" * 1000)
                    self.wfile.flush()
                    time.sleep(0.02 if self.path == "/slow" else 0)

        def log_message(self, *_: Any) -> None: ...

    endless = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=endless.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{endless.server_port}"
    try:
        monkeypatch.setattr(fetching, "MOST_BYTES", 50_000)
        with pytest.raises(UserError, match=r"more than 50000 bytes"):
            open_image(address + "/fast", fetch=Fetch("any"))
        monkeypatch.setattr(fetching, "MOST_SECONDS", 0.3)
        with pytest.raises(UserError, match=r"more than 0\.3 s"):
            open_image(address + "/slow", fetch=Fetch("any"))
    finally:
        endless.shutdown()
        endless.server_close()


def test_a_port_in_use_is_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.url.split(":")[2].split("/")[0]
    assert main(["serve", "tiny", "--port", port]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --port: {port} on 127.0.0.1 can't be had (address already in use)")
    assert error.count("\n") == 1
    assert main(["serve", "tiny", "--port", "70000"]) == 2
    assert main(["serve", "tiny", "--host", "203.0.113.7"]) == 2
    assert main(["serve", "tiny", "--max_request_mib", "0"]) == 2
    with socket.socket() as free:  # and what's wrong with the checkpoint is the usual line
        free.bind(("127.0.0.1", 0))
    assert main(["serve", "no/such/folder", "--port", "0"]) == 2
    assert "no/such/folder" in capsys.readouterr().err


def test_what_the_page_types(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code and "dynllava serve tiny --port 8000 --policy full" in page
    exec(code[1].replace("http://127.0.0.1:8000/v1", server.url), {"IMAGE": data_url(boxes())})
    assert capsys.readouterr().out.strip()


def test_untrained_predictors_are_said_once(server: Server, client: Any) -> None:
    for _ in range(2):
        text_of(
            client, turn("What is this?", data_url(boxes())), max_tokens=1, extra_body={"policy": "image"}
        )
    assert server.text.count("a request asks for image: the checkpoint has no predictors, untrained") == 1


def test_bench_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes().save(tmp_path / "boxes.png")
    command = [
        "bench",
        "serve",
        "--pretrained",
        "tiny",
        "--images",
        str(tmp_path),
        "--clients",
        "1,3",
        "--requests",
        "2",
    ]
    command += [
        "--new-tokens",
        "4",
        "--repeats",
        "1",
        "--mode",
        "fastv,k=2",
        "--batch-size",
        "1,2",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [(row["mode"], row["path"], row["batch"], row["requests"]) for row in rows] == [
        (mode, f"http, {size} together", clients, max(clients, 2))
        for clients in (1, 3) for size in (1, 2) for mode in ("full", "fastv,k=2")
    ]  # fmt: skip
    for row in rows:
        assert (
            0 < row["first_token_s"] and 1 / row["requests_per_s"] > row["first_token_s"] / row["batch"] / 2
        )
        full = next(
            other for other in rows
            if other["mode"] == "full" and (other["batch"], other["path"]) == (row["batch"], row["path"])
        )  # fmt: skip
        assert row["speedup"] == pytest.approx(row["requests_per_s"] / full["requests_per_s"])
    assert "Serving over HTTP" in (tmp_path / "out" / "table.md").read_text()
    assert (
        main([*command, "--resume"]) == 0 and json.loads((tmp_path / "out" / "rows.json").read_text()) == rows
    )
    assert (
        main(["bench", "serve", "--clients", "0"]) == 2 and main(["bench", "serve", "--requests", "0"]) == 2
    )
    assert main(["bench", "serve", "--pretrained", "no/such/folder"]) == 2
    errors = capsys.readouterr().err.splitlines()[-3:]
    assert (
        errors[0].startswith("error: --clients: '0'") and errors[1] == "error: --requests: 0 is less than 1"
    )
    assert errors[2].startswith("error: no/such/folder")
