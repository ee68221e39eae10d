"""An iterator that runs ahead in a thread, so that its caller does not wait for data."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The same items in the same order, up to `depth` of them made before they are asked for.

    What `items` raises is raised here at its turn. Closing the iterator ends the thread after the
    item it is at.
    """
    ready: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=depth)
    is_closed = threading.Event()

    def run() -> None:
        try:
            for item in items:
                ready.put(("item", item))
                if is_closed.is_set():
                    return
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value  # pyright: ignore[reportGeneralTypeIssues]
            yield value  # pyright: ignore[reportReturnType]
    finally:
        is_closed.set()
        while thread.is_alive():
            try:
                ready.get(timeout=0.05)  # makes room for the item that the thread may hold
            except queue.Empty:
                continue
