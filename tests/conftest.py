"Fixtures that several files share."

import pytest


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    "Encoded sample scenes, and one thread."
    import torch  # here: many files need neither
    import training

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("training")
    training.prepare(path)
    yield path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tab():
    "A tab of a headless Chromium; skipped where there is none."
    pytest.importorskip("websocket")
    import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    tab = browser.Browser()
    yield tab
    tab.close()
