"""A contender that greets while it is imported, as some packages do."""

from tests.bench.fake_work import prepare

__all__ = ["prepare"]

print("hello {'seconds': 0}")
