"""`python -m dpo_keras.app` is `dpo-keras`."""

import sys

from dpo_keras.app.cli import main

sys.exit(main())
