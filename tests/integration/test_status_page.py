"""The status page in headless Chromium: in front of a real agent with a real job, and of every state there is."""

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.job import Launch
from harness.pages import (
    CHROMIUM,
    TOKEN,
    Shown,
    chromium,
    coordinated,
    document,
    incident,
    job_of,
    shown,
)
from harness.programs import adam, network, train_step
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

pytest.importorskip("playwright.sync_api", reason="run make install")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # playwright's own
    pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no Chromium here: make test-page installs Debian's"),
]

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=2</script>&amp;\'"\u202e`'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Seen:
    """One page, and what it did beyond what was asked of it."""

    def __init__(self, browser: Any, address: str, width: int = 1100, height: int = 900, scheme: Any = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.failed: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on(
            "requestfailed", lambda request: self.failed.append(request.url)
        )  # among them, what is not let out
        self.address = address

    def enter(self, token: str = TOKEN) -> Any:
        """Sign in, and wait until there is something to see."""
        self.page.goto(f"{self.address}/?token={token}")
        self.page.wait_for_selector("#live.on", timeout=30_000)
        return self.page

    def __enter__(self) -> "Seen":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture
def many() -> Iterator[Shown]:
    """Sixty-four ranks, of which one is stalled."""
    job = job_of(64)
    told = {"job": job.name, "rank": 3, "pid": 777, "heartbeat_age": 0.3, "step": 5, "phase": "step",
        "store": "", "attempt": 2, "world_size": 64, "committed": -1}  # fmt: skip
    with shown(document(coordinated(job, (17,)), incidents=[incident()], ranks=[told])) as server:
        yield server


def train(rank: Rank, store: str) -> None:
    model = network()
    optimizer = adam(model)
    run = ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every=5)
    while not (rank.folder / "go-end").exists():
        train_step(model, optimizer, run.steps_done)
        run.step()
        time.sleep(0.05)
    run.close()


def number(text: str) -> int:
    return int(text.split()[0].replace(",", ""))


@pytest.mark.slow
def test_a_real_job_is_seen_live_until_the_agent_is_gone(
    browser: Any, runtime: Runtime, launch: Launch, tmp_path: Path
) -> None:
    runtime.leaves_snapshots = True
    agent = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
    address = runtime.status(runtime.sockets)["page"]
    token = (runtime.sockets / "http-token").read_text()
    with launch.plain(1, train, str(tmp_path / "store")) as job, Seen(browser, address) as seen:
        page = seen.enter(token)
        assert page.url == f"{address}/"  # without the token
        step = page.locator(".tiles div", has_text="step").first.locator("dd")
        step.wait_for(timeout=30_000)
        before = number(step.inner_text())
        eventually(lambda: number(step.inner_text()) > before + 5, "the step to move")
        page.locator("table.list .ok").first.wait_for(timeout=30_000)
        assert page.locator(".pill").inner_text().startswith(("training", "saving"))
        assert page.get_by_role("gridcell").count() == 1

        os.kill(runtime.agents()[0].pid, signal.SIGKILL)
        page.locator("#stale").wait_for(state="visible", timeout=30_000)
        assert re.search(r"The agent does not answer\. What you see is from \d\d:\d\d:\d\d", page.inner_text("#stale"))
        assert page.locator("#live-text").inner_text() == "no connection"
        assert "(no connection)" in page.title()
        agent.wait(10)
        job.go("end")

        again = runtime.start_agent("--metrics-listen", address.removeprefix("http://"))
        page.locator("#stale").wait_for(state="hidden", timeout=30_000)  # and nobody had to sign in again
        assert page.locator("#live-text").inner_text() == "live"
        assert {url.split("?")[0].removeprefix(address) for url in seen.asked} <= {"/", "/events", "/status.json"}
        job.results()
    again.terminate()
    again.wait(30)


@pytest.mark.slow
def test_every_way_in_but_one_is_shut(browser: Any, many: Shown) -> None:
    def status(path: str, **headers: str) -> int:
        request = urllib.request.Request(f"{many.address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    for path in ("/", "/events", "/status.json", "/metrics", "/incidents/last", "/?token=wrong", "/nothing"):
        assert status(path) == 401
        assert status(path, Authorization="Bearer wrong") == 401
    assert status("/healthz") == 200
    assert status("/status.json", Authorization=f"Bearer {TOKEN}") == 200
    assert status("/nothing", Authorization=f"Bearer {TOKEN}") == 404
    assert status("/incidents/../../etc/passwd", Authorization=f"Bearer {TOKEN}") == 404
    assert status("/healthz", Host="rebind.example") == 421
    with Seen(browser, many.address) as seen:
        assert seen.page.goto(many.address).status == 401
        assert "ckptsvc status --url" in seen.page.inner_text("main")
        seen.enter()
        assert seen.page.evaluate("document.cookie") == ""  # no script sees it
        assert seen.page.goto(f"{many.address}/status.json").status == 200


@pytest.mark.slow
def test_events_have_numbers_and_an_old_one_does_no_harm(many: Shown) -> None:
    for last in ("7", "x" * 1000):
        headers = {"Authorization": f"Bearer {TOKEN}", "Last-Event-ID": last}
        with urllib.request.urlopen(
            urllib.request.Request(f"{many.address}/events", headers=headers), timeout=20
        ) as stream:
            head = [stream.readline() for _ in range(5)]
            assert [line.split(b":")[0] for line in head] == [b"retry", b"\n", b"event", b"id", b"data"]
            assert json.loads(head[4].removeprefix(b"data: "))["coordinates"][0]["job"] == "llama-8b"
            while stream.readline() != b": keep-alive\n":  # nothing has changed since
                pass
            assert stream.readline() == b"event: alive\n"


def test_the_ranks_by_keyboard(browser: Any, many: Shown) -> None:
    with Seen(browser, many.address) as seen:
        page = seen.enter()

        def at() -> str:
            return str(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))

        for _ in range(3):
            page.keyboard.press("Tab")
            if at().startswith("rank 0:"):
                break
        assert at() == "rank 0: training"
        assert page.locator("[role=gridcell][tabindex='0']").count() == 1
        page.keyboard.press("ArrowRight")
        assert at().startswith("rank 1:")
        page.keyboard.press("ArrowDown")
        below = at()
        assert below not in ("rank 1: training", "rank 2: training")
        page.keyboard.press("ArrowUp")
        assert at().startswith("rank 1:")
        page.keyboard.press("Control+End")
        assert at().startswith("rank 63:")
        page.keyboard.press("Control+Home")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        detail = page.locator(".detail")
        assert detail.inner_text().splitlines()[0] == "Rank 3 on nid000001"
        assert "process 777" in detail.inner_text()
        assert at() == "rank 3"
        many.document["coordinates"][0]["step"] += 1  # a new document does not take the focus away
        page.locator(".tiles dd", has_text="12,431").wait_for(timeout=20_000)
        assert at() == "rank 3"
        page.keyboard.press("Escape")
        assert detail.is_hidden()
        assert at() == "rank 3: training"
        page.keyboard.press("Tab")
        assert at() not in ("rank 4: training", "rank 3: training")  # the grid is one stop


STATES = {
    "idle": lambda: document(incidents=[incident(job="gone")]),
    "stalled": lambda: document(coordinated(job_of(64), (17,)), incidents=[incident()]),
    "a very long name": lambda: document(coordinated(job_of(8, name="x" * 300))),
    "6,144 ranks": lambda: document(coordinated(job_of(6144), (17,))),
}


@pytest.mark.parametrize(
    "state", [pytest.param(state, marks=pytest.mark.slow if state != "stalled" else ()) for state in STATES]
)
def test_it_fits_a_phone(browser: Any, state: str) -> None:
    with shown(STATES[state]()) as server, Seen(browser, server.address, 390, 844, "dark") as seen:
        page = seen.enter()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = """[...document.querySelectorAll('button, .events a')].filter(each => each.offsetParent
            && Math.min(each.offsetWidth, each.offsetHeight) < 18).map(each => each.className)"""
        assert page.evaluate(small) == []
        assert seen.said == []


def test_orders_of_people_are_seen(browser: Any) -> None:
    pause = {"job": "llama-8b", "step": 12_440, "by": "ada", "reason": HOSTILE, "until": time.time() + 7200}
    told = document(coordinated(job_of(8)), paused=[pause], vacated=f"drained by bob {HOSTILE}")
    with shown(told) as server, Seen(browser, server.address, 390, 844) as seen:
        page = seen.enter()
        assert page.inner_text("#vacated") == f"This node takes no new jobs: drained by bob {HOSTILE}"
        assert page.locator(".pill").inner_text() == "saves are paused"
        said = page.locator(".trouble li").first.inner_text()
        assert said == f"Paused by ada: no automatic snapshots from step 12,440 on, for 2 h more; {HOSTILE}"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        server.document = document(coordinated(job_of(8)))
        page.locator("#vacated").wait_for(state="hidden", timeout=20_000)
        assert page.locator(".pill").inner_text() == "training"
        assert page.locator(".trouble").first.is_hidden()
        assert seen.said == []


def test_what_jobs_are_called_is_text(browser: Any) -> None:
    job = job_of(4, 2, name=HOSTILE)
    job.store = HOSTILE
    job.ranks = {rank: f"{node}{HOSTILE}" for rank, node in job.ranks.items()}
    job.doing = {node: pb.Progressed(highest=1, phases=[HOSTILE]) for node in job.nodes}
    hostile = coordinated(job, aside={HOSTILE: HOSTILE}, nics=[HOSTILE])
    hostile["checkpoints"][0] |= {"outcome": HOSTILE, "reason": HOSTILE, "tiers": [HOSTILE]}
    bad = incident(job=HOSTILE, kind=HOSTILE, sentence=HOSTILE, actions=[HOSTILE], id=HOSTILE, opened=HOSTILE)
    launch = {"job": HOSTILE, "phase": "running", "attempt": 1, "nodes": 1, "min_nodes": 1,
        "max_nodes": 1, "restarts": 0, "max_restarts": 0,
        "stop_wanted": HOSTILE, "ended": None, "status": None, "reason": HOSTILE}  # fmt: skip
    with (
        shown(document(hostile, node=HOSTILE, incidents=[bad, bad | {"job": "other"}], launches=[launch])) as server,
        Seen(browser, server.address) as seen,
    ):
        page = seen.enter()
        page.get_by_role("gridcell").first.click()
        assert page.locator(".job h2").inner_text() == HOSTILE
        assert page.evaluate("window.hit") is None
        assert page.locator("main img, main script").count() == 0
        assert page.locator(f"#{'jobs'} a").first.get_attribute("href").startswith("/incidents/%3Cimg")
        assert seen.said == []  # no policy had to step in, nothing failed
        assert all(url.startswith(server.address) for url in seen.asked)


@pytest.mark.slow
def test_an_element_that_got_in_would_not_run(browser: Any, many: Shown) -> None:
    with Seen(browser, many.address) as seen:
        page = seen.enter()
        page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.hit = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend",
                '<img src="https://elsewhere.example/x" onerror="window.hit = 2"><p style="color: red">x</p>');
            const far = document.createElement("script");
            far.src = "https://elsewhere.example/x.js";
            document.body.append(far);
        }""")  # fmt: skip
        page.wait_for_timeout(300)
        assert page.evaluate("window.hit") is None
        assert len([line for line in seen.said if "Content Security Policy" in line]) >= 4
        reached = [each for each in seen.failed if not each.startswith(many.address)]
        assert sorted(set(seen.asked) - {url for url in seen.asked if url.startswith(many.address)}) == sorted(reached)


CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = each => {
    for (; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if ((colour[3] ?? 1) > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !each.offsetParent || each.closest("svg, noscript, script, style, .skip, .quiet")) continue;
    const a = light(parse(getComputedStyle(each).color)), b = light(behind(each));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${each.className || each.tagName} ${each.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return [...new Set(low)];
}"""


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_it_can_be_read_by_everybody(browser: Any, scheme: str) -> None:
    job = job_of(64)
    for number, phase in enumerate(("save", "restore", "attach", "evaluation")):
        job.doing[job.nodes[number]] = pb.Progressed(highest=job.highest - 9 * number, phases=[phase])
    job.doing[job.nodes[5]] = pb.Progressed(highest=job.highest - 9)
    job.away[job.nodes[4]] = 100.0
    for rank in (61, 62, 63):
        node = job.ranks.pop(rank)
        if rank < 63:
            job.ended[rank] = node, rank == 61
    running = {"epoch": 3, "step": 12_431, "tiers": ["memory"], "outcome": "running", "reason": "",
        "bytes": 1 << 30, "seconds": 9.2,
        "began": time.time() - 9, "ended": None, "ranks": 64, "staged": 64, "durable": 21}  # fmt: skip
    told = coordinated(job, (17,), aside={"n9": "a spare"})
    told["checkpoints"][:0] = [running]
    with (
        shown(document(told, incidents=[incident(), incident(job="x")])) as server,
        Seen(browser, server.address, scheme=scheme) as seen,
    ):
        page = seen.enter()
        page.get_by_text("Show all").click()
        assert page.evaluate(CONTRAST) == []
        states = page.evaluate(
            "[...new Set([...document.querySelectorAll('.cell')].map(each => each.textContent + ' ' + each.className))]"
        )
        assert (
            len({state.split()[0] for state in states}) == len(states) >= 9
        )  # each has a sign of its own, not only a colour
        assert page.get_by_role("grid").get_attribute("aria-label") == "ranks of job llama-8b"
        assert page.get_by_role("row").count() > 8
        assert page.get_by_role("table", name="checkpoints, newest first").is_visible()
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.get_by_role("status").inner_text() == "live"
        nameless = """[...document.querySelectorAll('button, a, [role=img], [role=grid]')]
            .filter(each => !(each.textContent.trim() || each.getAttribute('aria-label'))).length"""
        assert page.evaluate(nameless) == 0
        assert page.evaluate("document.documentElement.lang") == "en"
        server.call(server.site.close)
        page.locator("#stale").wait_for(state="visible", timeout=20_000)
        assert page.evaluate(CONTRAST) == []


@pytest.mark.slow
def test_six_thousand_ranks_are_a_cell_a_node(browser: Any) -> None:
    job = job_of(6144)
    node = job.ranks.pop(4001)
    job.ended[4001] = node, True
    with shown(document(coordinated(job, (17,)))) as server, Seen(browser, server.address) as seen:
        page = seen.enter()
        assert page.get_by_role("gridcell").count() == 768
        assert page.locator(".cell.dead").get_attribute("aria-label") == f"{node}, ranks 4000-4007: 7 training, 1 dead"
        assert page.locator(".trouble li:visible").all_inner_texts() == [
            f"rank 4001 on {node} is dead",
            "rank 17 on nid000003 is stalled",
        ]
        page.locator(".cell.stalled").click()
        assert "1 stalled" in page.inner_text(".detail")
