"""What is tried every night: sanitizers, fuzzed operators, killed commands, flipped bits.

    make nightly                                   everything; counts go to .nightly/counts.json
    make nightly NIGHTLY="fuzz --cases 20000"      one part
    make nightly NIGHTLY="page"                    docs/reliability.md from the committed counts

Every part counts what it tried, what survived and what was lost, and tells each loss in words that
repeat it. ``python_tests/test_nightly.py`` runs a small share of every part.
"""
