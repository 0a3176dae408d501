"""Look at the course in a real browser: JupyterLab from `make lab`, an exercise done wrong and right, pairs judged in the labeling panel, a slider moved.

    python tools/browser_check.py FOLDER      screenshots go to FOLDER

A check made by hand before a release; no test runs it. It needs what the project does not: Chromium with its driver
(Debian: `apt-get install chromium chromium-driver`, and `fonts-noto-color-emoji` to see emoji) and selenium 4
(`pip install selenium`), which may stand in another environment than .venv. Nothing is saved to the notebooks, and nothing
is read from or written to the user's own Jupyter set-up.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "exercises" / "00a_tiny_arena.ipynb"
EXERCISE = "rao_kupper"
WRONG = ["d = np.asarray(margins, dtype=float)", "a = 1 / (1 + np.exp(tie_margin + d))",
         "b = 1 / (1 + np.exp(tie_margin - d))", "return np.stack([a, b, 1 - a - b], axis=-1)"]  # fmt: skip
RIGHT = [WRONG[0], "a = 1 / (1 + np.exp(tie_margin - d))", "b = 1 / (1 + np.exp(tie_margin + d))", WRONG[3]]
MISTAKE = "You have a and b the wrong way round"
PANEL_NOTEBOOK = ROOT / "exercises" / "01b_labeling.ipynb"
PANEL_ROWS = [  # every first response ends in markup that would run, every second one is long
    {"prompt": f"Greet the world in {language}. <b>{number}</b>", "response_a": f"{text}\n\n<img src=x onerror='window.ran=1'><script>window.ran=1</script>",
     "response_b": "\n\n".join(["A long answer, line after line, " * 12] * 12) + " THE END", "winner": "a", "model_a": "SECRET-ONE",
     "model_b": "SECRET-TWO"}
    for number, (language, text) in enumerate([("Hebrew", "שלום עולם, זה משפט ארוך מספיק."), ("Arabic", "مرحبا بالعالم، هذه جملة طويلة."),
                                               ("emoji", "👋🌍 👩‍👩‍👧‍👦 🏳️‍🌈 😀"), ("English", "Hello, world! $x^2$"), ("tabs", "two\n\tlines")])]  # fmt: skip
SLIDER_NOTEBOOK, SLIDER_CELL = ROOT / "nbs" / "02_padding.ipynb", "batch_slider(texts"
PANEL_CELL = """import json
from rlhf_course.labeling import Labeling, start_labeling
start_labeling(Labeling(json.load(open({rows!r})), {answers!r}, repeat_share=0.2, name="browser"))"""
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--window-size=1500,1100"]  # fmt: skip
PANEL_JS = ("const app = window.jupyterapp; const panel = app && [...app.shell.widgets('main')]"
            ".find(w => w.isVisible && w.content && w.content.widgets); const nb = panel && panel.content;")  # fmt: skip


@contextmanager
def lab(scratch: Path):
    """The address of a JupyterLab that `make lab` started, with all its settings in `scratch`; stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = scratch / "settings" / "@jupyterlab"
    for name, text in {"docmanager-extension/plugin": '{"autosave": false}',
                       "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}.items():  # fmt: skip
        (settings / name).parent.mkdir(parents=True)
        (settings / f"{name}.jupyterlab-settings").write_text(text)
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config",
              "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}  # fmt: skip
    env = {**os.environ, **{name: str(scratch / place) for name, place in places.items()}}
    options = f"--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=look --LabApp.expose_app_in_browser=True"
    root = "--allow-root" if hasattr(os, "getuid") and os.getuid() == 0 else ""
    with open(scratch / "lab.log", "w") as log:
        server = subprocess.Popen(["make", "lab", f"ARGS={options} {root}"], cwd=ROOT, env=env, stdout=log, stderr=log,
                                  start_new_session=True)  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(f"{address}/api?token=look"), 600, "JupyterLab does not answer", server)
            yield address
        except BaseException:
            print((scratch / "lab.log").read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def wait_for(condition, seconds: float, otherwise: str, server: subprocess.Popen | None = None) -> None:
    """Return when the condition holds; exit with a message where it does not in time, or the server has ended."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or (server and server.poll() is not None):
            raise SystemExit(f"{otherwise} after {seconds:.0f} s" if not server or server.poll() is None else "`make lab` ended")
        time.sleep(0.5)


@contextmanager
def chromium(profile: Path):
    """A browser with an empty profile."""
    options = webdriver.ChromeOptions()
    for argument in [*CHROMIUM, f"--user-data-dir={profile}"]:
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """JupyterLab in the browser: what a learner clicks, types and sees."""

    def __init__(self, driver, folder: Path):
        self.driver, self.folder, self.n_shots = driver, folder, 0

    def js(self, script: str, *arguments):
        """What a script on the page returns; `nb` is the notebook in front."""
        return self.driver.execute_script(PANEL_JS + script, *arguments)

    def shot(self, name: str) -> None:
        """Save what the browser shows."""
        time.sleep(1.5)  # for what scrolls and fades
        self.n_shots += 1
        self.driver.save_screenshot(str(self.folder / f"{self.n_shots}_{name}.png"))

    def click(self, xpath: str) -> None:
        """Click the element, when it is there."""
        WebDriverWait(self.driver, 60).until(lambda driver: driver.find_elements(By.XPATH, xpath))[0].click()

    def ready(self, name: str) -> None:
        """Wait until the notebook of this name is in front and its kernel idle."""
        script = ("const session = panel && panel.context.isReady && panel.context.path.endsWith(arguments[0])"
                  "&& panel.sessionContext.session; return !!session && session.kernel.status === 'idle'")  # fmt: skip
        wait_for(lambda: self.js(script, name), 120, f"{name} is not ready")
        self.js("app.shell.activateById(panel.id)")

    def cell_of(self, start: str) -> int:
        """The place of the one cell whose source starts so."""
        [place] = self.js("return nb.widgets.map((w, i) => [w.model.sharedModel.getSource(), i])"
                          ".filter(([s]) => s.startsWith(arguments[0])).map(([, i]) => i)", start)  # fmt: skip
        return place

    def show(self, place: int) -> None:
        """Bring a cell to the middle and select it."""
        self.js("nb.activeCellIndex = arguments[0]; nb.mode = 'command'; nb.node.focus(); return nb.scrollToItem(arguments[0], 'center')", place)
        time.sleep(0.5)

    def keys(self, *keys: str) -> None:
        """Press keys, the first of each chord held."""
        actions = webdriver.ActionChains(self.driver)
        for chord in keys:
            held, pressed = (chord[:-1], chord[-1]) if isinstance(chord, tuple) else ((), chord)
            for key in held:
                actions.key_down(key)
            actions.send_keys(pressed)
            for key in reversed(held):
                actions.key_up(key)
        actions.perform()

    def type_body(self, place: int, old_lines: int, lines: list[str]) -> None:
        """Type these lines over the last lines of a cell, as at a keyboard, and run the cell."""
        self.show(place)
        up = [(Keys.SHIFT, Keys.ARROW_UP)] * (old_lines - 1)
        self.keys(Keys.ENTER, (Keys.CONTROL, Keys.END), *up, (Keys.SHIFT, Keys.HOME))
        for number, line in enumerate(lines):
            self.keys(*([Keys.ENTER] if number else []), line)
        self.keys(Keys.ESCAPE, (Keys.SHIFT, Keys.ENTER))

    def run(self, place: int) -> str:
        """What the cell shows below its source after it was run."""
        before = self.js("return nb.widgets[arguments[0]].model.executionCount", place)
        self.show(place)
        self.keys((Keys.SHIFT, Keys.ENTER))
        wait_for(lambda: self.js("return nb.widgets[arguments[0]].model.executionCount", place) not in (None, before), 120, "the cell does not run")
        wait_for(self.idle, 120, "the kernel stays busy")
        return self.output(place)

    def idle(self) -> bool:
        """Whether the kernel of the notebook in front has nothing to do."""
        return self.js("const session = panel && panel.sessionContext.session; return !!session && session.kernel.status === 'idle'")

    def output(self, place: int) -> str:
        """The text below a cell, which is drawn only where it is in view."""
        self.show(place)
        return self.js("return nb.widgets[arguments[0]].outputArea.node.innerText", place)

    def says(self, place: int, *words: str, without: str = "") -> str:
        """The text below a cell, once it holds these words and not those: it may be drawn some time after the kernel is done."""
        holds = lambda text: all(word in text for word in words) and not (without and without in text)
        wait_for(lambda: holds(self.output(place)), 60, f"cell {place} does not say {words}, but {self.output(place)!r}")
        return self.output(place)

    def menu(self, *path: str) -> None:
        """Click a menu and then its item."""
        for kind, text in zip(("lm-MenuBar-itemLabel", "lm-Menu-itemLabel"), path):
            self.click(f"//*[contains(@class, '{kind}') and text()='{text}']")

    def put_cell(self, source: str) -> int:
        """The place of a new cell below the title."""
        self.js("nb.model.sharedModel.insertCell(1, {cell_type: 'code', source: arguments[0]})", source)
        return 1


def look(address: str, driver, folder: Path) -> None:
    """The way of a learner, from the first page to an exercise that passes."""
    page = Page(driver, folder)
    driver.get(f"{address}/?token=look")
    page.ready("index.ipynb")
    page.shot("first_page")
    page.js("const i = nb.widgets.findIndex(w => w.model.sharedModel.getSource().startsWith('## The lessons')); return nb.scrollToItem(i, 'start')")
    page.shot("table_of_lessons")
    page.click(f"//a[contains(@href, '{NOTEBOOK.parent.name}/{NOTEBOOK.name}') or contains(@data-commandlinker-args, '{NOTEBOOK.name}')]")
    page.ready(NOTEBOOK.name)
    page.shot("exercises")

    stub, check = page.cell_of(f"def {EXERCISE}("), page.cell_of(f"check({EXERCISE})")
    page.menu("Run", "Run All Cells")
    wait_for(lambda: page.js("return nb.widgets[arguments[0]].model.executionCount", check), 300, "the first check does not run")
    page.ready(NOTEBOOK.name)
    page.says(check, "not written yet")
    page.shot("run_all_stub")

    page.type_body(stub, 1, WRONG)
    page.run(check)
    page.says(check, MISTAKE)
    page.shot("wrong_answer")

    page.type_body(stub, len(WRONG), RIGHT)
    page.run(check)
    print(page.says(check, EXERCISE, "probes", without=MISTAKE))
    page.shot("right_answer")


class PanelPage(Page):
    """The labeling panel in a notebook: what is shown, and a hand on mouse and keyboard."""

    def panel(self) -> dict[str, str]:
        """The texts of the panel, from the page."""
        names = ["progress", "prompt", "left", "right", "message"]
        return dict(zip(names, self.js("return [...nb.widgets[1].outputArea.node.querySelectorAll('.widget-html-content')].map(e => e.innerText)")))

    def wait_for_progress(self, text: str) -> None:
        """Return when the panel's first line says so."""
        wait_for(lambda: self.panel().get("progress") == text, 30, f"the panel does not say {text!r} but {self.panel()}")

    def press(self, text: str) -> None:
        """Click the button whose text starts so."""
        self.click(f"//button[contains(@class, 'widget-button') and starts-with(normalize-space(), '{text}')]")

    def type(self, text: str) -> None:
        """Click into the box, type, press Enter."""
        self.click("//div[contains(@class, 'widget-text')]//input")
        self.keys(*text, Keys.ENTER)


def look_at_panel(address: str, driver, folder: Path, scratch: Path) -> None:
    """Five pairs and a repeat: buttons, keys, a wrong key, a double click, hostile and long texts, a kernel that is restarted in the middle."""
    rows, answers = scratch / "rows.json", scratch / "answers.jsonl"
    rows.write_text(json.dumps(PANEL_ROWS), encoding="utf-8")

    def saved() -> list[str]:
        return [json.loads(line)["winner"] for line in answers.read_text(encoding="utf-8").splitlines()] if answers.exists() else []

    page = PanelPage(driver, folder)
    page.n_shots = len(list(folder.glob("*.png")))
    driver.get(f"{address}/lab/tree/{PANEL_NOTEBOOK.relative_to(ROOT)}?token=look")
    page.ready(PANEL_NOTEBOOK.name)
    place = page.put_cell(PANEL_CELL.format(rows=str(rows), answers=str(answers)))
    page.run(place)
    page.wait_for_progress("question 1 of 6")
    page.shot("panel")
    seen = page.panel()
    assert "<b>" in seen["prompt"] and "SECRET" not in page.output(place) and {"<script>" in seen["left"], "<script>" in seen["right"]} == {True, False}
    boxes = page.js("return [...nb.widgets[1].outputArea.node.querySelectorAll('[dir=auto]')].map(e => [e.scrollHeight, e.clientHeight])")
    assert any(inside > 2 * shown for inside, shown in boxes) and all(shown < 400 for _, shown in boxes), boxes

    page.press("left")
    page.wait_for_progress("question 2 of 6")
    page.type("x")
    wait_for(lambda: "is no answer" in page.panel()["message"], 30, "no message about a wrong key")
    page.shot("wrong_key")
    assert saved() == ["a"]
    page.type("b")
    page.wait_for_progress("question 3 of 6")
    assert saved() == ["a", "b"] and not driver.find_element(By.XPATH, "//div[contains(@class, 'widget-text')]//input").get_attribute("value")

    page.js("panel.sessionContext.session.kernel.restart(); nb.widgets[1].model.clearExecution()")  # the old panel goes
    time.sleep(2)
    page.ready(PANEL_NOTEBOOK.name)
    page.run(place)
    page.wait_for_progress("question 3 of 6")
    page.shot("resumed")
    time.sleep(0.5)  # longer than what counts as a double click
    button = driver.find_element(By.XPATH, "//button[contains(@class, 'widget-button') and starts-with(normalize-space(), 'tie')]")
    webdriver.ActionChains(driver).double_click(button).perform()
    wait_for(lambda: "double click" in page.panel()["message"], 30, "a double click is not noticed")
    page.shot("double_click")
    assert saved() == ["a", "b", "tie"] and page.panel()["progress"] == "question 4 of 6"

    for number, act in enumerate([lambda: page.type("A"), lambda: page.press("right"), lambda: page.type("t")], 5):
        page.shot(f"question_{number - 1}")
        seen = page.panel()
        [row] = [row for row in PANEL_ROWS if row["prompt"] in seen["prompt"]]
        sides = ("left", "right") if seen["left"].split("\n", 1)[1].strip() == row["response_a"] else ("right", "left")
        assert [seen[side].split("\n", 1)[1].strip() for side in sides] == [row["response_a"], row["response_b"]], seen
        act()
        page.wait_for_progress(f"question {number} of 6" if number < 7 else "all 6 questions answered")
    page.shot("report")
    assert saved() == ["a", "b", "tie", "a", "b", "tie"] and "self-agreement on repeats" in page.panel()["prompt"]
    assert page.js("return window.ran") is None, "markup of a response was run"
    print(page.panel()["prompt"])


def look_at_slider(address: str, driver, folder: Path) -> None:
    """The lesson is run up to its slider; the slider moved by the keyboard and a menu changed each redraw the picture."""
    page = Page(driver, folder)
    page.n_shots = len(list(folder.glob("*.png")))
    driver.get(f"{address}/lab/tree/{SLIDER_NOTEBOOK.relative_to(ROOT)}?token=look")
    page.ready(SLIDER_NOTEBOOK.name)
    place = page.cell_of(SLIDER_CELL)
    page.show(place)
    page.menu("Run", "Run All Above Selected Cell")
    last = page.js("return nb.widgets.slice(0, arguments[0]).findLastIndex(w => w.model.type === 'code')", place)
    wait_for(lambda: page.js("return nb.widgets[arguments[0]].model.executionCount", last), 600, "the cells above the slider do not run")
    page.run(place)
    shown = "const i = nb.widgets[arguments[0]].outputArea.node.querySelector('.jupyter-widgets img'); return i && i.naturalWidth > 100 && i.src"
    picture = lambda: page.js(shown, place)
    wait_for(picture, 60, "the slider's picture does not come")
    page.shot("slider")
    actions = {"slider_moved": ("//div[contains(@class, 'noUi-handle')]", [Keys.ARROW_RIGHT] * 5),
               "menu_changed": ("//div[contains(@class, 'widget-dropdown')]//select", [Keys.ARROW_DOWN, Keys.ENTER])}  # fmt: skip
    for name, (control, keys) in actions.items():
        before = picture()
        page.click(control)
        page.keys(*keys)
        wait_for(lambda: picture() not in (None, False, before), 60, f"{name}: the picture stays")
        page.shot(name)


def main() -> None:
    """Make the screenshots, or stop where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the screenshots go; made when needed")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    before = [path.read_bytes() for path in (NOTEBOOK, PANEL_NOTEBOOK, SLIDER_NOTEBOOK)]
    with tempfile.TemporaryDirectory() as scratch, lab(Path(scratch)) as address, chromium(Path(scratch) / "profile") as driver:
        try:
            look(address, driver, folder)
            look_at_panel(address, driver, folder, Path(scratch))
            look_at_slider(address, driver, folder)
        except BaseException:
            driver.save_screenshot(str(folder / "failed.png"))
            raise
    assert [path.read_bytes() for path in (NOTEBOOK, PANEL_NOTEBOOK, SLIDER_NOTEBOOK)] == before, "a notebook was changed"
    print(f"The exercise was found, a mistake was named, the right answer passed, six judgements were made, a slider moved: screenshots in {folder}")


if __name__ == "__main__":
    main()
