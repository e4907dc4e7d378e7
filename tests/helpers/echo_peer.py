"""A peer that has no library: for tests of the pipe to peers."""

from benchmarks.peers import server
from benchmarks.steps import Step


def count(*, upto: int) -> dict[str, Step]:
    print("libraries print what they like")
    calls = []
    return {
        "counts": Step(lambda: calls.append(None)),
        "fails": Step(lambda: 1 // (len(calls) - upto)),
    }


if __name__ == "__main__":
    server.serve("1.2.3", {"count": count})
