"""A headless Chromium (Debian packages chromium and chromium-driver) with JavaScript switched off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service as DriverService
from selenium.webdriver.chrome.webdriver import WebDriver

import orderlib
from tests.support.api_process import Service, serving, settings_for
from tests.support.databases import Database

WIDE = (1280, 900)
PHONE = (360, 800)
SMALL = (320, 640)

#: Chromium's sizes of text in a usual and in a monospaced font.
FONT_SIZES = {"standard": 16, "fixed": 13}


@pytest.fixture(scope="session")
def _chromium() -> Iterator[WebDriver]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("these tests need Chromium: apt-get install chromium chromium-driver", pytrace=False)
    options = Options()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "disable-dev-shm-usage"),
    ):
        options.add_argument(f"--{flag}")
    # The pages must work without it, and must not run a script in an order.
    options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    browser = webdriver.Chrome(options, DriverService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(_chromium: WebDriver) -> WebDriver:
    """The browser with an empty page, a wide window and the light scheme."""
    _chromium.get("about:blank")
    show(_chromium, WIDE)
    return _chromium


def show(browser: WebDriver, size: tuple[int, int], scheme: str = "light", font_scale: float = 1) -> None:
    """Set the size of the window, the preferred color scheme, and how much larger than usual the fonts are."""
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700},
    )
    sizes = {kind: round(pixels * font_scale) for kind, pixels in FONT_SIZES.items()}
    browser.execute_cdp_cmd("Page.setFontSizes", {"fontSizes": sizes})
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


@pytest.fixture(scope="module")
def store(module_database: Database) -> Iterator[orderlib.PostgresOrderRepository]:
    """The repository for the orders of a test."""
    with orderlib.connect(module_database.writer_url) as repository:
        yield repository


@pytest.fixture(scope="module")
def api(module_database: Database) -> Iterator[Service]:
    """The API over these orders."""
    with serving(settings_for(module_database.reader_url)) as service:
        yield service
