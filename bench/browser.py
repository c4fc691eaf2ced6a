"""A headless Chromium for the page of `noetherperf view`: tests and the benchmark of the page drive it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

try:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait
except ModuleNotFoundError:  # a machine without network runs the tests that do without
    webdriver = None  # type: ignore[assignment]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = (
    "needs selenium, of the extra [test]"
    if webdriver is None
    else ""
    if CHROMIUM and DRIVER
    else "needs Chromium and chromedriver on the PATH"
)
PATIENCE = 60  # seconds, on a machine that is busy with other tests

FLAGS = (
    "--headless",
    "--no-sandbox",  # for root, as in a container; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
)


class Browser:
    """A window that shows a page, and what a user does there.

    Args:
        driver: Selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Open an address, and wait until everything is drawn."""
        self.driver.get(url)
        self.wait("document.documentElement.dataset.drawn > 0")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of an expression in the page."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, condition: str) -> None:
        """Wait until an expression holds in the page, and nothing is being drawn there.

        Raises:
            AssertionError: It does not come to hold.
        """
        idle = f"!!({condition}) && document.documentElement.dataset.busy === undefined"
        WebDriverWait(self.driver, PATIENCE, 0.02).until(
            lambda _: self.run(idle), f"{condition}; the page says: {self.text('#faults')}"
        )

    def text(self, selector: str) -> str:
        """The text of an element, "" where it is not shown."""
        return str(self.driver.find_element(By.CSS_SELECTOR, selector).text)

    def choose(self, selector: str, value: str) -> None:
        """Set a field as a user does."""
        self.run("(arguments[0].value = arguments[1], arguments[0].dispatchEvent(new Event('change')))",
                 self.driver.find_element(By.CSS_SELECTOR, selector), value)  # fmt: skip

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Click into an element, at these shares of its width and height."""
        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        box = element.rect
        actions = ActionChains(self.driver, duration=50)
        x, y = (int((share - 0.5) * size) for share, size in ((across, box["width"]), (down, box["height"])))
        actions.move_to_element_with_offset(element, x - 3, y).move_to_element_with_offset(element, x, y)
        actions.click().perform()

    def errors(self) -> list[str]:
        """What the console says since this was asked last, warnings and errors."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def cpu_seconds(self) -> float:
        """CPU time that the page's thread has spent on tasks: what it costs whatever else the machine does."""
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    def picture(self, file: Path) -> None:
        """Save the window as a picture."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.driver.get_screenshot_as_png())


@contextmanager
def open_browser(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser with a profile of its own, for as long as the context lasts."""
    with TemporaryDirectory(prefix="noetherperf-browser-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
        try:
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            yield Browser(driver)
        finally:
            driver.quit()
