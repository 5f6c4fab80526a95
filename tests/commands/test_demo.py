"""The server of the page, and the page itself in a browser where Gradio, Playwright and Chromium are installed."""

import io
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from vqrae_jax.commands import demo
from vqrae_jax.commands.same_origin import is_same_origin
from vqrae_jax.data import images, photographs
from vqrae_jax.errors import ConfigError, DataError, InstallError
from vqrae_jax.inference.edit_session import Editor, Session
from vqrae_jax.inference.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, photograph in zip("ab", photographs.load_photographs("validation"), strict=True):
        images.write_image(folder / f"{name}.png", photograph)
    (folder / "text.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def editor(trained):
    return Editor(Tokenizer.load(trained, batch_size=1))


def test_the_page_begins_with_examples_where_photographs_are_installed(editor, tmp_path, monkeypatch):
    examples = demo.load_examples()
    session = demo.first_session(editor, examples)
    assert all(session.slots)
    with zipfile.ZipFile(demo.write_archive(session, str(tmp_path))) as archive:
        assert set(archive.namelist()) == {"codes.npz", "first image.png", "second image.png", "mix.png"}
        codes = np.load(io.BytesIO(archive.read("codes.npz")))
        np.testing.assert_array_equal(codes["second image"], session.slots[1].codes)
        image = images.read_image(archive.read("second image.png"))
        np.testing.assert_array_equal(image, session.slots[1].reconstruction)
    monkeypatch.setattr(photographs, "_find_file", lambda *_: (_ for _ in ()).throw(DataError("not installed")))
    assert demo.load_examples() == []
    assert demo.first_session(editor, []) == Session(message=demo.HELP)
    assert demo.write_archive(Session(), str(tmp_path)) is None


def test_invalid_ports_and_a_missing_gradio_are_errors(monkeypatch, editor, tmp_path):
    for port in (0, 99999):
        with pytest.raises(ConfigError) as error:
            demo.serve(demo.parser.parse_args(["--checkpoint=x", f"--port={port}"]))
        assert (error.value.field, error.value.value) == ("--port", port)
    with pytest.raises(ConfigError) as error:
        demo.serve(demo.parser.parse_args([]))
    assert error.value.field == "--checkpoint"
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InstallError, match=r"vqrae-jax\[demo\]"):
        demo.build_blocks(editor, str(tmp_path))


@pytest.mark.slow
def test_a_port_in_use_is_an_error(monkeypatch, editor, trained):
    pytest.importorskip("gradio", reason="the page needs the demo extra")
    monkeypatch.setattr(demo.runtime, "set_environment", lambda **_: None)
    monkeypatch.setattr(demo.Tokenizer, "load", lambda *_, **__: editor.tokenizer)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError) as error:
            demo.serve(demo.parser.parse_args([f"--checkpoint={trained}", f"--port={port}"]))
    assert (error.value.field, error.value.value) == ("--port", port)


@pytest.fixture(scope="module")
def served(trained_generator, tmp_path_factory):
    """Yields the address of the page and the folder that is its TMPDIR."""
    pytest.importorskip("gradio", reason="the page needs the demo extra")
    temporary = tmp_path_factory.mktemp("temporary")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--generator={trained_generator}", f"--port={port}", "--max-upload=1", "--allow-host=proxy.example"]
    log = tmp_path_factory.mktemp("log") / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "vqrae_jax.commands.demo", *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | {"TMPDIR": str(temporary)},
        )  # fmt: skip
    try:
        assert process.stdout.readline().startswith(f"serving http://127.0.0.1:{port}/")
        yield f"http://127.0.0.1:{port}/", temporary
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not list(temporary.iterdir()), "files are left behind"
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(not pathlib.Path("/proc/net/tcp").exists(), reason="lists sockets with Linux's /proc")
def test_it_listens_to_this_machine_only(served):
    port = int(served[0].rstrip("/").rpartition(":")[2])
    tables = [pathlib.Path("/proc/net") / name for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}


def test_large_uploads_and_other_files_of_the_machine_are_rejected(served):
    httpx = pytest.importorskip("httpx")
    response = httpx.post(served[0] + "gradio_api/upload", files={"files": ("x.png", bytes(2 << 20))})
    assert response.status_code == 413
    for path in (ROOT / "README.md", "/etc/hostname"):
        assert httpx.get(f"{served[0]}gradio_api/file={path}").status_code in (403, 404)


def test_only_the_page_itself_may_send_requests(served):
    httpx = pytest.importorskip("httpx")
    port = int(served[0].rstrip("/").rpartition(":")[2])
    for host, origin, status in (
        (f"127.0.0.1:{port}", None, 200), (f"localhost:{port}", f"http://localhost:{port}", 200),
        (f"proxy.example:{port}", f"https://proxy.example:{port}", 200), ("[::1]", "http://[::1]", 200),
        ("evil.example", None, 403), (f"evil.example:{port}", f"http://evil.example:{port}", 403),
        (f"127.0.0.1:{port}", "http://evil.example", 403), (f"127.0.0.1:{port}", "null", 403),
        (f"127.0.0.1:{port}", f"http://localhost:{port}", 403), (f"127.0.0.1:{port}", "http://127.0.0.1:1", 403),
        ("localhost.evil.example", None, 403), ("[", None, 403), ("", None, 403),
    ):  # fmt: skip
        headers = {"host": host} | ({} if origin is None else {"origin": origin})
        assert httpx.get(served[0], headers=headers).status_code == status, headers
        response = httpx.post(served[0] + "gradio_api/upload", headers=headers, files={"files": ("x.txt", b"x")})
        assert response.status_code == status, headers
    assert not is_same_origin([], ["localhost"])
    assert not is_same_origin([(b"host", b"localhost"), (b"host", b"127.0.0.1")], ["localhost"])


class Visit:
    """A tab of the page in a browser, and the message of that tab."""

    def __init__(self, driver, browser, address, tab, message):
        self.driver, self.message = driver, message
        self.page = browser.new_page(viewport={"width": 1300, "height": 1100})
        self.page.set_default_timeout(60_000)
        self.page.goto(address)
        self.page.get_by_role("tab", name=tab).click()

    def wait_for_message(self, text):
        self.driver.expect(self.page.locator(self.message)).to_contain_text(text, timeout=60_000)

    def click(self, view, across, down, answer):
        """Clicks a point of an image, until the message has the answer."""
        page, image = self.page, self.page.locator(f"#{view} img")
        image.scroll_into_view_if_needed()
        loaded = "image => image.complete && image.naturalWidth && image.clientWidth > 100"
        page.wait_for_function(loaded, arg=image.element_handle())  # a view that is being replaced has no size
        box = image.bounding_box()
        for _ in range(3):
            image.click(position={"x": across * box["width"], "y": down * box["height"]})
            try:
                answered = "([id, answer]) => document.querySelector(id).innerText.includes(answer)"
                page.wait_for_function(answered, arg=[self.message, answer], timeout=20_000)
                break
            except self.driver.TimeoutError:
                pass  # the browser lost a click on a view that Gradio was replacing
        self.wait_for_message(answer)

    def fill(self, field, value):
        field = self.page.locator(f"#{field} input")
        field.fill(value)
        field.press("Enter")
        field.blur()  # closes a list

    def wait_for_another(self, view, source):
        """Waits until an image has another source than an earlier one."""
        changed = "([id, old]) => document.querySelector(id)?.src !== old"
        self.page.wait_for_function(changed, arg=[f"#{view} img", source])

    def source(self, view):
        return self.page.locator(f"#{view} img").get_attribute("src")


@pytest.fixture(scope="module")
def visit(served):
    """A function that opens a tab of the page in a new window of one browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    address, requests = served[0], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser.on("context", lambda context: context.on("request", lambda request: requests.append(request.url)))
        yield lambda tab, message: Visit(playwright, browser, address, tab, message)
        browser.close()
    assert requests
    assert all(url.startswith((address, "data:", "blob:")) for url in requests), "requests to another server"


@needs_browser
def test_codes_in_a_browser(visit, served, files, tmp_path):
    on = visit("Look at codes", "#message")
    page = on.page
    page.wait_for_selector("#codes2 img")  # of the examples
    page.set_input_files("#upload1 input[type=file]", files / "text.png")
    on.wait_for_message("text.png")
    for slot, name in enumerate("ba"):
        page.set_input_files(f"#upload{slot} input[type=file]", files / f"{name}.png")
        on.wait_for_message("PSNR")
        on.click(f"codes{slot}", 0.9, 0.4, "Row 1, column 3")
    page.wait_for_selector("#nearest img")
    page.click("#action >> text=paste codes")
    on.click("reconstruction1", 0.1, 0.1, "opposite corner")
    on.click("codes1", 0.4, 0.4, "2 x 2 codes selected")
    before = on.source("reconstruction2")
    on.click("codes2", 0.6, 0.6, "Pasted at row 2, column 2")
    on.wait_for_another("reconstruction2", before)
    with page.expect_download() as download:
        page.click("#download")
    assert zipfile.is_zipfile(download.value.path())
    page.locator("#blend input[type=range]").focus()
    page.keyboard.press("End")
    page.locator("#blend input[type=range]").dispatch_event("pointerup")
    on.wait_for_message("100% those of the second")
    page.click("#restore")
    on.wait_for_message("The mix is the first image")
    page.locator("#examples0 button").nth(1).click()
    on.wait_for_message("PSNR")
    page.screenshot(path=tmp_path / "page.png")
    assert len(np.unique(images.read_image(tmp_path / "page.png").reshape(-1, 3), axis=0)) > 100
    assert [path.name[:15] for path in served[1].iterdir() if "vqrae" in path.name] == ["vqrae-jax-demo-"]


@pytest.mark.slow
@needs_browser
def test_generation_in_a_browser(visit):
    on = visit("Generate", "#generate-message")
    on.fill("generate-steps", "0")
    on.page.click("button#generate")
    on.wait_for_message("Steps=0: must be at least 1.")
    on.fill("generate-steps", "2")
    on.page.click("button#generate")
    on.wait_for_message("Click a sample")
    assert on.page.locator("#samples img").count() == 8
    assert on.page.locator("#samples").inner_text().split() == ["cat", "dog"] * 4
    steps = on.source("steps")
    on.page.locator("#samples button").nth(1).click()
    on.wait_for_another("steps", steps)
    on.page.click("#use")  # opens the tab "Repaint"
    on.page.wait_for_selector("#before img", state="visible")


@needs_browser
@pytest.mark.slow
def test_repainting_in_a_browser(visit):
    on = visit("Repaint", "#repaint-message")
    on.page.wait_for_selector("#before img")  # the first example
    on.click("before", 0.1, 0.1, "opposite corner")
    on.click("before", 0.4, 0.9, "4 x 2 codes")
    on.fill("repaint-class", "bird")
    on.page.click("button#repaint")
    on.wait_for_message("unknown class; expected one of cat, dog")
    on.fill("repaint-class", "dog")
    on.page.click("button#repaint")
    on.wait_for_message("codes changed")
    on.page.wait_for_selector("#after img")
    on.page.locator("#examplesrepaint button").nth(1).click()
    on.wait_for_message("Click two opposite corners")
    on.page.wait_for_selector("#after img", state="detached")
