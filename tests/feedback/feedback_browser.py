"""Debian's chromium, driven by selenium, and a real server for it on the loopback."""

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from dpo_keras.feedback.annotation_server import bind, make_app, make_server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-default-browser-check",
    "--disable-extensions",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)


@contextlib.contextmanager
def served(store, app=None, port=0, **options):
    """The address of a server of this store."""
    listening = bind("127.0.0.1", port)
    listening.listen(512)  # as `run` does: who connects now waits
    server = make_server(app or make_app(store, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(20)
        listening.close()


@contextlib.contextmanager
def browsing(profile, size=(1280, 900)):
    """A browser with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(20)
    driver.set_script_timeout(20)
    try:
        yield driver
    finally:
        driver.quit()


def until(condition, seconds=10.0):
    """Waits for something to become true, and gives it."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Page:
    """The page of one person, and what they can see and do."""

    def __init__(self, driver, address, store, name="ann", *, admin=False, path="/"):
        self.driver, self.address, self.store = driver, address, store
        self.person, token = store.add_annotator(name, admin=admin)
        driver.delete_all_cookies()
        driver.get("about:blank")
        driver.get_log("browser")  # what earlier pages left
        driver.get(f"{address}{path}#{token}")

    def script(self, code):
        return self.driver.execute_script(f"return {code}")

    def text(self, where):
        return self.script(f"document.getElementById('{where}').innerText")

    def ready(self):
        return until(lambda: self.script("!document.getElementById('work').hidden && !busy && 1"))

    def prompt(self):
        self.ready()
        return self.text("prompt-body")

    def key(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def moved_on(self, before):
        until(lambda: self.script("!busy") and self.text("prompt-body") != before)

    def verdicts(self):
        rows = self.store.database.rows("SELECT verdict FROM judgements ORDER BY id")
        return [row["verdict"] for row in rows]

    def quiet(self):
        """Nothing was refused by the policy, and no script failed."""
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def picture(self, name):
        """Kept where FEEDBACK_SCREENSHOTS says, to be looked at by eye."""
        if folder := os.environ.get("FEEDBACK_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder, f"{name}.png")))
