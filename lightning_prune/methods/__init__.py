"""One file per published method: pure functions first, the callback second."""
