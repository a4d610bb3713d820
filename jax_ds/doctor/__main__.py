"""`python -m jax_ds.doctor`."""

import sys

from jax_ds.doctor import main

sys.exit(main())
