"""The pages as a person sees them: in Chromium, light and dark, wide and narrow."""

import pytest

from portattn.report.reader import Reader
from portattn.report.write import report
from portattn.tuning_db.location import locate
from tests import stored
from tests.serve.chromium import Page
from tests.serve.server import serving

pytestmark = pytest.mark.browser

# The contrast of each element that shows text with what lies behind it (WCAG 2, 1.4.3).
CONTRASTS = """
(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("h1, h2, h3, a, td, th, span, b, .soft, svg text")]
    .filter((e) => e.textContent.trim() && e.getClientRects().length)
    .map((e) => {
      const style = getComputedStyle(e);
      const ink = e instanceof SVGElement ? style.fill : style.color;
      const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.tagName + ": " + e.textContent.slice(0, 30)];
    });
})()
"""
SHOWN = "[...document.querySelectorAll('#bests tbody tr')].filter(r => !r.hidden).map(r => "
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page():
    with Page() as one:
        yield one


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return stored.database(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def url(database):
    with serving(database) as address:
        yield address


@pytest.fixture(autouse=True)
def nothing_to_complain(page):
    page.requests.clear()
    page.complaints.clear()
    page.look()
    yield
    assert page.complaints == []


def test_from_the_devices_to_a_search(page, url):
    page.go(url + "/")
    assert page.do("document.querySelectorAll('.card.device').length") == 2
    page.follow(".card.device:last-child h2 a")
    assert page.do("document.querySelector('h1').textContent") == "an H100"
    assert page.do(SHOWN + "r.cells[1].textContent)") == ["cupy_forward_sm90", "triton_forward"]
    page.follow("#bests a")
    assert page.do("document.querySelectorAll('svg.convergence, svg.parallel').length") == 4
    assert page.do("document.querySelector('svg.convergence').getBoundingClientRect().width") > 300
    assert page.do("document.querySelectorAll('svg.convergence .dot').length") == 22
    assert page.do("document.querySelectorAll('.rejected tbody tr').length") == 4
    page.follow(".crumbs a")
    assert page.do("document.querySelector('h1').textContent") == "Devices"
    assert all(one.startswith(url + "/") for one in page.requests)
    assert len(page.requests) >= 4


def test_the_table_filters_and_sorts(page, url):
    page.go(f"{url}/devices/{stored.CPU.fingerprint}")
    assert page.do("document.querySelector('input[type=search]').hidden") is False
    assert len(page.do(SHOWN + "r.cells[0].textContent)")) == 2
    page.type("input[type=search]", "band forward")
    shown = page.do(SHOWN + "r.cells[0].textContent)")
    assert len(shown) == 1
    assert "band" in shown[0]
    page.type("input[type=search]", " nothing")
    assert page.do(SHOWN + "1)") == []

    page.go(f"{url}/devices/{stored.GPU.fingerprint}")
    best = SHOWN + "Number(r.cells[3].dataset.value))"
    page.press("#bests th:nth-child(4)")
    assert page.do(best) == [2_000_000, 4_000_000]
    page.press("#bests th:nth-child(4)")
    assert page.do(best) == [4_000_000, 2_000_000]
    assert page.do("document.querySelector('[aria-sort]').textContent") == "best"


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_dark(page, url, dark):
    page.look(dark=dark)
    page.go(f"{url}/devices/{stored.GPU.fingerprint}")
    page.follow("#bests a")
    red, *_ = [int(part) for part in page.do(BACKGROUND)[4:-1].split(",")]
    assert red < 64 if dark else red > 192
    contrasts = page.do(CONTRASTS)
    assert len(contrasts) > 50
    assert [one for one in contrasts if one[0] < 4.5] == []


def test_a_narrow_window_needs_no_sideways_scrolling(page, url):
    page.look(width=400)
    for path in ("/", f"/devices/{stored.CPU.fingerprint}"):
        page.go(url + path)
        assert page.do(OVERFLOW) <= 0
    page.follow("#bests a")
    assert page.do(OVERFLOW) <= 0


def test_texts_of_the_database_stay_texts(page, url):
    page.go(f"{url}/devices/{stored.CPU.fingerprint}")
    assert stored.HOSTILE in page.do("document.querySelector('h1').textContent")


def test_the_report_opens_from_a_file(page, database, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report(Reader(locate(database))))
    page.go(path.as_uri())
    assert page.requests == [path.as_uri()]
    assert page.do("document.querySelectorAll('details[open]').length") == 0
    page.press("details summary")
    assert page.do("document.querySelector('details').open") is True
    width = page.do("document.querySelector('svg.parallel').getBoundingClientRect().width")
    assert width > 300
