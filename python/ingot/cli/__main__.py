"""``python -m ingot.cli``, for where the script is not on the path."""

from ingot.cli import main

raise SystemExit(main())
