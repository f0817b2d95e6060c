"""The pages in a browser: search, paging, escaping, keyboard, layout, contrast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.wait import WebDriverWait

import orderlib
from orderlib.models import Order
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.page.conftest import PHONE, SMALL, WIDE, show
from tests.support.api_process import Service, serving, settings_for
from tests.support.databases import Database
from tests.support.tcp_proxy import TcpProxy

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\"'&amp;"


def order(order_uid: str, **changed: Any) -> Order:
    return attrs.evolve(SAMPLE, order_uid=order_uid, **changed)


def one(browser: WebDriver, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def texts(browser: WebDriver, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


@contextmanager
def page_change(browser: WebDriver) -> Iterator[None]:
    """Run the block, which leads to another page, and wait for that page."""
    left = one(browser, "html")
    yield
    # While the page is replaced, the driver may fail with another error than that of a stale element.
    WebDriverWait(browser, 10, ignored_exceptions=[WebDriverException]).until(staleness_of(left))


def search(browser: WebDriver, text: str) -> None:
    field = one(browser, "#q")
    field.clear()
    with page_change(browser):
        field.send_keys(text, Keys.ENTER)


def click(browser: WebDriver, selector: str) -> None:
    with page_change(browser):
        one(browser, selector).click()


def path_of(browser: WebDriver) -> str:
    return "/" + browser.current_url.split("/", 3)[3]


def test_an_order_is_found_by_its_uid(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(order("page-1", delivery=attrs.evolve(SAMPLE.delivery, name="Ada Lovelace")))
    browser.get(f"http://{api.address}/")
    search(browser, "  page-1 ")
    assert path_of(browser) == "/orders/page-1"
    assert one(browser, "h1").text == "Order page-1"
    assert "Ada Lovelace" in texts(browser, "dd")
    assert "18.17\N{NO-BREAK SPACE}USD" in texts(browser, "dd") or "18.17 USD" in texts(browser, "dd")
    assert "26 Nov 2021, 06:22:19 UTC" in one(browser, "main").text


def test_one_match_opens_the_order_whatever_it_is_found_by(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(
        order(
            "Found-by-1",
            track_number="T/rack & 1",
            customer_id="Kund\N{LATIN SMALL LETTER O WITH DIAERESIS} 1",
            delivery=attrs.evolve(SAMPLE.delivery, phone="+49 (30) 901820", email="Ada@Found.example"),
            items=[attrs.evolve(SAMPLE.items[0], rid="rid/found")],
        )
    )
    for text in (
        *("found-by-1", "FOUND-B", f"http://{api.address}/orders/Found-by-1?format=json", "T/rack & 1"),
        *("Kund\N{LATIN SMALL LETTER O WITH DIAERESIS} 1", "49/30/901820", "ada@found.EXAMPLE", "rid/found"),
    ):
        browser.get(f"http://{api.address}/")
        search(browser, text)
        assert path_of(browser) == "/orders/Found-by-1", text


def test_several_matches_are_listed_with_the_reason_of_each(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    for n in range(25):
        store.save(order(f"several-{n:02}", delivery=attrs.evolve(SAMPLE.delivery, phone="030/77")))
    store.save(order("several", customer_id="03077"))
    browser.get(f"http://{api.address}/")
    search(browser, "03077")
    assert one(browser, "h1").text == "20 or more orders match 03077"
    assert one(browser, "#q").get_attribute("value") == "03077"
    assert texts(browser, "tbody th")[:2] == ["several", "several-24"]
    assert texts(browser, "td.reason")[:2] == ["customer", "phone"]
    assert len(texts(browser, "tbody th")) == 20
    browser.find_element(By.LINK_TEXT, "All orders with this phone").click()
    assert path_of(browser) == "/orders?phone=03077"
    assert texts(browser, "tbody th")[0] == "several-24"
    assert one(browser, "#q").get_attribute("value") == "03077"


def test_a_search_without_result_shows_that_and_can_be_corrected(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(order("page-3"))
    browser.get(f"http://{api.address}/")
    search(browser, "page-4")
    assert one(browser, "h1").text == "Nothing found"
    assert "a phone number" in one(browser, "main").text
    assert one(browser, "#q").get_attribute("value") == "page-4"
    search(browser, "page-3")
    assert one(browser, "h1").text == "Order page-3"


def test_the_list_can_be_paged_to_its_end_and_back(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    uids = [f"paged-{n:02}" for n in range(45)]
    for uid in uids:
        store.save(order(uid, customer_id="paged"))
    browser.get(f"http://{api.address}/orders?customer_id=paged")
    assert texts(browser, "nav [rel=prev]") == []
    pages = [texts(browser, "tbody th")]
    while browser.find_elements(By.CSS_SELECTOR, "nav [rel=next]"):
        click(browser, "nav [rel=next]")
        pages.append(texts(browser, "tbody th"))
    assert [uid for page in pages for uid in page] == uids[::-1]
    back = [pages[-1]]
    while browser.find_elements(By.CSS_SELECTOR, "nav [rel=prev]"):
        click(browser, "nav [rel=prev]")
        back.append(texts(browser, "tbody th"))
    assert back == pages[::-1]


def test_the_newest_orders_are_on_the_start_page(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    for n in range(21):
        store.save(order(f"newest-{n}"))
    browser.get(f"http://{api.address}/")
    assert texts(browser, "tbody th")[:2] == ["newest-20", "newest-19"]
    click(browser, "nav [rel=next]")
    assert texts(browser, "tbody th")[0] == "newest-0"


def test_the_status_strip_shows_the_newest_order_and_the_rejects(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    with orderlib.postgres.connections.open_connection(
        module_database.superuser_url, application_name="tests"
    ) as connection:
        connection.execute(
            "INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, code, faults)"
            " SELECT 't', 0, n, 't', now(),"
            """ 'invalid_order', '{"total": 0, "first": []}' FROM generate_series(1, 3) n"""
        )
    store.save(order("just-now"))
    browser.get(f"http://{api.address}/")
    status = dict(zip(texts(browser, ".status dt"), texts(browser, ".status dd"), strict=True))
    assert status["Newest order"].endswith(" s ago")
    assert int(status["Stored in the last 5 min"]) >= 1
    assert "3 invalid order" in status["Rejects"]
    assert status["Database"] == "answers"


def test_the_rejects_are_opened_from_the_status_and_filtered(
    browser: WebDriver, api: Service, module_database: Database
) -> None:
    fault = '{"total": 1, "first": [{"path": "$.items[0].sale", "expected": "at most 100", "found": "101"}]}'
    with orderlib.postgres.connections.open_connection(
        module_database.superuser_url, application_name="tests"
    ) as connection:
        connection.execute(
            "INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, code, faults)"
            " VALUES ('u', 1, 7, 'shop', now(), 'too_large', %s), ('u', 1, 8, 'shop', now(), 'malformed_json', %s)",
            [fault, fault],
        )
    browser.get(f"http://{api.address}/")
    with page_change(browser):
        browser.find_element(By.LINK_TEXT, "1 too large").click()
    assert path_of(browser) == "/rejects?code=too_large"
    assert texts(browser, "article h2") == ["shop/1/7"]
    assert texts(browser, ".faults tbody tr")[0].split() == ["$.items[0].sale", "at", "most", "100", "101"]
    assert "rejects redrive" in one(browser, "main").text
    with page_change(browser):
        browser.find_element(By.LINK_TEXT, "last hour").click()
    assert texts(browser, "article h2") == ["shop/1/7"]
    with page_change(browser):
        browser.find_element(By.LINK_TEXT, "malformed json").click()
    assert texts(browser, "article h2") == ["shop/1/8"]


def test_html_in_an_order_is_shown_as_text(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(
        order(
            "hostile",
            customer_id=EVIL,
            track_number=EVIL,
            delivery=attrs.evolve(SAMPLE.delivery, name=EVIL),
            items=[attrs.evolve(SAMPLE.items[0], name=EVIL, brand=EVIL)],
        )
    )
    browser.get(f"http://{api.address}/orders/hostile")
    assert EVIL in texts(browser, "dd")
    assert any(EVIL in text for text in texts(browser, "tbody th"))
    for path in ("/orders/hostile", "/", "/orders"):
        browser.get(f"http://{api.address}{path}")
        assert "owned" not in browser.title
        assert browser.find_elements(By.CSS_SELECTOR, "script, img, main [onerror]") == []
    browser.get(f"http://{api.address}/orders/hostile")
    click(browser, "main dd a")
    assert EVIL in one(browser, "h1").text
    assert browser.find_elements(By.CSS_SELECTOR, "script, img") == []


def test_a_value_is_shown_as_stored_so_that_its_copy_is_found(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    spaced = {"customer_id": "a  b", "track_number": "T   1"}
    store.save(order("spaced", **spaced, items=[attrs.evolve(SAMPLE.items[0], name="x   y", rid="r  1")]))
    store.save(order("spaced-2", **spaced))
    browser.get(f"http://{api.address}/orders/spaced")
    assert {*spaced.values()} <= {*texts(browser, "dd")}
    assert one(browser, "tbody th").text == f"x   y\n{SAMPLE.items[0].brand} · r  1"
    for size in (WIDE, PHONE):
        show(browser, size)
        browser.get(f"http://{api.address}/orders?customer_id=a++b")
        assert one(browser, "h1").get_attribute("textContent") == "Orders of customer a  b"
        assert one(browser, "caption").get_attribute("textContent") == "Orders of customer a  b"
        assert browser.title == "Orders of customer \u2068a b\u2069 · Orders"
        copied = one(browser, "tbody .customer").text
        search(browser, copied)
        assert texts(browser, "tbody .customer") == ["a  b", "a  b"]
        assert one(browser, "h1").text == "2 orders match a  b"


def test_text_from_right_to_left_is_isolated(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    hebrew = "\u05d0\u05d1 12"
    delivery = dict.fromkeys(("name", "phone", "zip", "city", "address", "region", "email"), hebrew)
    item = attrs.evolve(SAMPLE.items[0], track_number=hebrew + "3", rid=hebrew, name=hebrew, size=hebrew, brand=hebrew)
    changed = dict.fromkeys(("track_number", "customer_id", "delivery_service", "entry", "locale"), hebrew)
    store.save(order("hebrew", **changed, delivery=attrs.evolve(SAMPLE.delivery, **delivery), items=[item]))
    store.save(order("hebrew-2", **changed))
    browser.get(f"http://{api.address}/orders/hebrew")
    for path, expected in (
        ("/orders/hebrew", 17),
        (f"/orders?customer_id={hebrew}", 6),
        (f"/search?q={hebrew}", 5),
    ):
        browser.get(f"http://{api.address}{path}")
        directions = browser.execute_script(DIRECTIONS, hebrew[:2])
        assert directions == ["rtl"] * expected, path


def test_the_head_of_an_order_says_what_matters_first(
    browser: WebDriver, store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    items = [attrs.evolve(SAMPLE.items[0], status=status) for status in (202, 404, 202)]
    store.save(order("head", items=items, sm_id=1))
    store.save(order("head", items=items))
    words = settings_for(module_database.reader_url, ORDERS_API_STATUS_WORDS="202:accepted, 404:not found")
    with serving(words) as api:
        browser.get(f"http://{api.address}/orders/head")
        facts = dict(zip(texts(browser, ".summary dt"), texts(browser, ".summary dd"), strict=True))
        assert facts["Total"].replace("\N{NO-BREAK SPACE}", " ") == "18.17 USD"
        assert facts["Items"] == "3"
        assert facts["Status"] == "202 accepted (2), 404 not found (1)"
        assert facts["Created"] == "26 Nov 2021, 06:22:19 UTC"
        assert facts["Version"].startswith("2\nfirst stored ")
        assert facts["Kafka record"] == "none: saved from Python"
        assert facts["Stored"].endswith(" UTC")
        one(browser, "h1 .code").click()
        assert browser.execute_script("return getSelection().toString()") == "head"


def test_the_kafka_position_of_an_order_is_shown(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    store.save(order("sent"))
    with orderlib.postgres.connections.open_connection(
        module_database.superuser_url, application_name="tests"
    ) as connection:
        connection.execute(
            "UPDATE orders SET source_topic_id = 'tid', source_partition = 3, source_offset = 1234,"
            " source_time = now() WHERE order_uid = 'sent'"
        )
    browser.get(f"http://{api.address}/orders/sent")
    assert "partition 3, offset 1234\ntopic id tid" in texts(browser, ".summary dd")


def test_items_have_a_total_and_a_track_number_only_where_it_differs(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    same = attrs.evolve(SAMPLE.items[0], track_number="T", total_price=100)
    store.save_many([order("one-track", track_number="T", items=[same, attrs.evolve(same, track_number="")])])
    browser.get(f"http://{api.address}/orders/one-track")
    assert "Track number" not in texts(browser, ".items thead th")
    assert one(browser, "tfoot").text.replace("\N{NO-BREAK SPACE}", " ") == "All items 2.00 USD"
    store.save(order("two-tracks", track_number="T", items=[same, attrs.evolve(same, track_number="Other")]))
    browser.get(f"http://{api.address}/orders/two-tracks")
    assert "Track number" in texts(browser, ".items thead th")
    assert texts(browser, ".items [data-name='Track number']") == ["\N{EN DASH}", "Other"]


def test_empty_fields_are_folded(browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository) -> None:
    store.save(order("folded", delivery=attrs.evolve(SAMPLE.delivery, zip="", region="", email="")))
    browser.get(f"http://{api.address}/orders/folded")
    folded = one(browser, "details")
    assert folded.get_attribute("open") is None
    assert "Postal code" not in texts(browser, "dt")
    one(browser, "summary").send_keys(Keys.ENTER)
    assert folded.get_attribute("open")
    assert folded.text == "3 empty fields\nE-mail, Postal code, Region"


def test_the_json_is_readable_and_leads_back(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(order("raw", customer_id=EVIL))
    browser.get(f"http://{api.address}/orders/raw")
    click(browser, "a[href$='view=json']")
    text = one(browser, "pre").text
    assert json.loads(text) == api.get("/orders/raw").json
    assert text.startswith('{\n  "order_uid": "raw",\n')
    click(browser, "[rel=prev]")
    assert path_of(browser) == "/orders/raw"
    browser.get(f"http://{api.address}/orders/raw?view=json")
    click(browser, "a[href$='format=json']")
    assert one(browser, "pre").text == api.get("/orders/raw").text


def test_a_list_has_a_count_links_and_a_way_back(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    long = "L" * 100
    for n in range(21):
        store.save(order(f"counted-{n}", customer_id=long, track_number=f"track-{n}"))
    browser.get(f"http://{api.address}/orders?customer_id={long}")
    assert one(browser, ".links").text == "21 orders\nAll orders"
    assert one(browser, "tbody .stored").text.endswith(" s ago")
    customer = one(browser, "tbody .customer [title]")
    assert (customer.text, customer.get_attribute("title")) == ("L" * 31 + "\N{HORIZONTAL ELLIPSIS}" + "L" * 8, long)
    click(browser, "tbody .track a")
    assert path_of(browser) == "/orders?track_number=track-20"
    assert one(browser, ".links").text == "1 order\nAll orders"
    click(browser, "tbody .customer a")
    click(browser, ".links a")
    assert path_of(browser) == "/orders"


def test_an_order_takes_two_lines_of_a_list_on_a_phone(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save_many([longest(), order("short", customer_id="lines"), order("short-2", customer_id="lines")])
    for path in ("/orders", "/search?q=lines"):
        show(browser, PHONE)
        browser.get(f"http://{api.address}{path}")
        for row in browser.find_elements(By.CSS_SELECTOR, "tbody tr"):
            assert row.rect["height"] < 75
            cells = [cell.rect for cell in row.find_elements(By.CSS_SELECTOR, "th, td") if cell.is_displayed()]
            assert len({round(cell["y"] / 12) for cell in cells}) == 2, row.text


def test_a_long_customer_id_leaves_space_for_the_track_number_on_a_phone(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    uuid = "123e4567-e89b-12d3-a456-426614174000"
    store.save(order(uuid, customer_id=uuid, track_number=uuid))
    show(browser, PHONE)
    browser.get(f"http://{api.address}/orders?customer_id={uuid}")
    for cell in ("th", ".customer", ".track"):
        assert one(browser, f"tbody {cell}").text == uuid
        assert one(browser, f"tbody {cell}").rect["width"] > 50


def test_the_pages_can_be_used_with_the_keyboard_only(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save_many([order("keys-1", customer_id="keys"), order("keys-2", customer_id="keys")])
    browser.get(f"http://{api.address}/")

    def press(key: str) -> WebElement:
        browser.switch_to.active_element.send_keys(key)
        return browser.switch_to.active_element

    skip = press(Keys.TAB)
    assert skip.text == "Skip to content"
    assert skip.rect["y"] >= 0
    assert skip.value_of_css_property("outline-style") == "solid"
    assert press(Keys.TAB).get_attribute("href") == f"http://{api.address}/"
    field = press(Keys.TAB)
    assert field.get_attribute("id") == "q"
    field.send_keys("keys")
    assert press(Keys.TAB).text == "Find"
    with page_change(browser):
        press(Keys.ENTER)
    assert texts(browser, "tbody th") == ["keys-2", "keys-1"]
    # Past the header, the next stop is the order.
    press(Keys.TAB).send_keys(Keys.ENTER)
    link = press(Keys.TAB)
    assert link.text == "keys-2"
    with page_change(browser):
        link.send_keys(Keys.ENTER)
    assert one(browser, "h1").text == "Order keys-2"


def test_every_link_and_field_is_reached_by_tab_and_shows_the_focus(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save_many([order("tab-1", customer_id="tab"), order("tab-2", customer_id="tab")])
    for path in ("/search?q=tab", "/rejects?code=invalid_order", "/orders/tab-1", "/orders/tab-1?view=json"):
        browser.get(f"http://{api.address}{path}")
        expected = len(browser.find_elements(By.CSS_SELECTOR, "a, input, button, summary, pre"))
        reached = set()
        for _ in range(expected):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            focused = browser.switch_to.active_element
            reached.add(focused.id)
            assert focused.value_of_css_property("outline-style") == "solid", focused.text
        assert len(reached) == expected, path


#: How many pixels of the outline of the focused element each side of a box hides that clips it.
HIDDEN_OUTLINE = """
const element = document.activeElement, style = getComputedStyle(element), box = element.getBoundingClientRect();
const width = parseFloat(style.outlineOffset) + parseFloat(style.outlineWidth);
let hidden = 0;
for (let e = element.parentElement; e; e = e.parentElement) {
  if (getComputedStyle(e).overflowX === "visible") continue;
  const clip = e.getBoundingClientRect();
  hidden = Math.max(hidden, clip.left - box.left + width, box.right + width - clip.right,
    clip.top - box.top + width, box.bottom + width - clip.bottom);
}
return hidden;
"""


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_the_outline_of_the_focus_is_complete(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository, size: tuple[int, int]
) -> None:
    store.save_many([longest(), order("outline", customer_id="outline"), order("outline-2", customer_id="outline")])
    show(browser, size)
    for path in ("/orders?limit=100", "/search?q=outline", "/orders/" + "W" * 128):
        browser.get(f"http://{api.address}{path}")
        for _ in range(12):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            assert browser.execute_script(HIDDEN_OUTLINE) <= 0.1, browser.switch_to.active_element.text


#: For each row of each table: the header of each column, and for each cell the header that belongs to it.
COLUMNS = """
const exposed = (row) => [...row.children].filter((e) => getComputedStyle(e).display !== "none");
return [...document.querySelectorAll("table")].map((table) => {
  const names = exposed(table.tHead.rows[0]).map((th) => th.textContent);
  return [...table.tBodies[0].rows].map((row) => [names, exposed(row).map((cell) => {
    const all = [...table.tHead.rows[0].children];
    return all[[...row.children].indexOf(cell)].textContent;
  })]);
}).flat();
"""


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_every_cell_is_in_the_column_of_its_header(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository, size: tuple[int, int]
) -> None:
    """Also for a screen reader, which ignores what is not displayed."""
    items = [SAMPLE.items[0], attrs.evolve(SAMPLE.items[0], size="", track_number="other")]
    store.save_many([order("columns", customer_id="columns", items=items), order("columns-2", customer_id="columns")])
    show(browser, size)
    for path in ("/orders", "/search?q=columns", "/orders/columns"):
        browser.get(f"http://{api.address}{path}")
        rows = browser.execute_script(COLUMNS)
        assert rows
        for headers, headers_of_cells in rows:
            assert headers == headers_of_cells, path


def longest() -> Order:
    """Return an order in which every text has its greatest length and no space."""
    item = attrs.evolve(SAMPLE.items[0], name="W" * 1024, brand="W" * 255, size="W" * 64, rid="W" * 255)
    return order(
        "W" * 128,
        track_number="W" * 255,
        customer_id="W" * 255,
        entry="W" * 255,
        internal_signature="W" * 4096,
        delivery=attrs.evolve(SAMPLE.delivery, name="W" * 255, address="W" * 1024, email="W" * 320, phone="9" * 64),
        payment=attrs.evolve(SAMPLE.payment, amount=2**63 - 1, goods_total=2**63 - 1, transaction="W" * 255),
        items=[item, SAMPLE.items[0]],
    )


@pytest.mark.parametrize("size", [WIDE, (800, 900), PHONE, SMALL])
@pytest.mark.parametrize("font_scale", [1, 1.5])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/orders/" + "W" * 128,
        f"/orders/{SAMPLE.order_uid}",
        "/orders?limit=100",
        "/search?q=x",
        "/rejects",
        f"/orders/{SAMPLE.order_uid}?view=json",
        "/orders/nobody",
    ],
)
def test_no_page_is_wider_than_the_window(
    browser: WebDriver,
    api: Service,
    store: orderlib.PostgresOrderRepository,
    size: tuple[int, int],
    font_scale: float,
    path: str,
) -> None:
    store.save_many([longest(), SAMPLE])
    show(browser, size, font_scale=font_scale)
    browser.get(f"http://{api.address}{path}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]


#: The direction of each element of the body that has this text.
DIRECTIONS = """
return [...document.querySelectorAll("body *")]
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.includes(arguments[0])))
  .map((e) => getComputedStyle(e).direction);
"""

#: The WCAG contrast of each text with the nearest background that is not transparent.
CONTRASTS = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => {
    c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll("body *")]
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return [e.tagName + ": " + e.textContent.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  })
  .filter(([, contrast]) => contrast < 4.5);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "path", ["/", f"/orders/{SAMPLE.order_uid}", "/search?q=nothing", "/orders/nobody", "/rejects"]
)
def test_every_text_has_enough_contrast(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository, scheme: str, path: str
) -> None:
    store.save(SAMPLE)
    show(browser, WIDE, scheme)
    browser.get(f"http://{api.address}{path}")
    ground = one(browser, "body").value_of_css_property("background-color")
    is_dark = int(ground.removeprefix("rgba(").split(",")[0]) < 128
    assert is_dark == (scheme == "dark")
    assert browser.execute_script(CONTRASTS) == []


@pytest.mark.parametrize(
    "path", ["/", f"/orders/{SAMPLE.order_uid}", "/orders", "/search?q=nothing", "/nowhere", "/rejects"]
)
def test_a_screen_reader_finds_landmarks_headings_and_tables(
    browser: WebDriver, api: Service, store: orderlib.PostgresOrderRepository, path: str
) -> None:
    store.save(SAMPLE)
    browser.get(f"http://{api.address}{path}")
    assert one(browser, "html").get_attribute("lang") == "en"
    assert len(texts(browser, "main")) == len(texts(browser, "h1")) == len(texts(browser, "[role=search]")) == 1
    assert one(browser, "label[for=q]").is_displayed()
    assert browser.title.endswith(" · Orders")
    for table in browser.find_elements(By.CSS_SELECTOR, "table"):
        assert table.find_element(By.CSS_SELECTOR, "caption").get_attribute("textContent")
        assert table.find_elements(By.CSS_SELECTOR, "thead th:not([scope=col]), tbody th:not([scope=row])") == []


def test_a_browser_sends_its_token_as_a_password(
    browser: WebDriver, store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    store.save(order("guarded"))
    with serving(settings_for(module_database.reader_url, ORDERS_API_TOKENS="people:t0ken")) as guarded:
        browser.get(f"http://{guarded.address}/orders/guarded")
        assert "guarded" not in browser.page_source
        browser.get(f"http://me:t0ken@{guarded.address}/orders/guarded")
        assert one(browser, "h1").text == "Order guarded"
        # The style sheet needs the token, too.
        assert one(browser, "header").value_of_css_property("display") == "flex"


def test_without_the_database_the_page_says_so_and_offers_to_try_again(
    browser: WebDriver, store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    store.save(order("retried"))
    with TcpProxy(module_database.reader_url) as wire, serving(settings_for(wire.url)) as cut_off:
        wire.cut()
        browser.get(f"http://{cut_off.address}/orders/retried")
        assert one(browser, "h1").text == "Orders cannot be read at the moment"
        assert "The database is unavailable" in one(browser, "main").text
        # It would discard what is typed into the search box.
        assert browser.find_elements(By.CSS_SELECTOR, "meta[http-equiv=refresh]") == []
        assert one(browser, "#q").is_displayed()
        wire.mend()
        with page_change(browser):
            browser.find_element(By.LINK_TEXT, "Try again").click()
        WebDriverWait(browser, 20).until(lambda _: one(browser, "h1").text == "Order retried")


@pytest.mark.parametrize(
    ("path", "title", "words"),
    [
        ("/orders/nobody", "Not found", "No order has this order_uid."),
        ("/nowhere", "Not found", "Check the address"),
        ("/orders?limit=0", "Invalid request", "limit: expected an integer from 1 to 100"),
    ],
)
def test_an_error_is_explained_with_a_next_step(
    browser: WebDriver, api: Service, path: str, title: str, words: str
) -> None:
    browser.get(f"http://{api.address}{path}")
    assert one(browser, "h1").text == title
    assert words in one(browser, "main").text
    click(browser, ".links a")
    assert path_of(browser) == "/orders"
