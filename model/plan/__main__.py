"""python -m model.plan: see model/plan/planner.py."""

import sys

from model.plan.planner import main

sys.exit(main())
