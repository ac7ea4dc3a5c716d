"""Print how many tests a pytest JUnit file calls skipped, by reason.

"All green" on a machine without a GPU must not be read as "tested on a GPU".
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter


def main() -> None:
    """Print the counts of the file named on the command line."""
    cases = list(ElementTree.parse(sys.argv[1]).iter("testcase"))
    reasons = Counter(skip.get("message", "?") for case in cases for skip in case.iter("skipped"))
    for reason, count in reasons.most_common():
        print(f"{count:6d}  {reason}")
    print(f"{len(cases)} tests in all, {sum(reasons.values())} of them skipped")


if __name__ == "__main__":
    main()
