# SPDX-License-Identifier: Apache-2.0
# The two commands of the README are "make demo" and "make test"; "make help" lists the others.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py setup.cfg pyproject.toml

# With a sourced ROS its rclpy is used; without one, the wheels of the extra "ros" are.
ifdef ROS_DISTRO
VENV_FLAGS := --system-site-packages
ROS_EXTRA :=
else
VENV_FLAGS :=
ROS_EXTRA := ros,
endif

# setuptools warns of every editable installation; here it is wanted.
export PYTHONWARNINGS := ignore:Editable installation

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint soak benchmarks colcon clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -e '.[$(ROS_EXTRA)report]'
	touch $@

$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -e '.[$(ROS_EXTRA)report,export,networks,openvino,ray,submission,test]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## synthetic drive -> bag -> the real node -> metrics, latency, report
	$(BIN)/anomaly-seg demo --output demo_output

test: $(VENV)/.test  ## the whole quick suite and the linters
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.test  ## the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow --timeout 3600

lint: $(VENV)/.test  ## ruff, mypy, flake8 with ament's settings
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/flake8 --statistics .

soak: $(VENV)/.test  ## 30 minutes of the node under load
	$(BIN)/python benchmarks/soak.py --minutes 30

benchmarks: $(VENV)/.test  ## every table in docs/, measured here
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

colcon: $(VENV)/.test  ## build and test as a ROS package
	. $(BIN)/activate && colcon build && colcon test --event-handlers console_direct+ \
	  && colcon test-result --verbose

clean:  ## remove everything that was built
	rm -rf $(VENV) build install log demo_output *.egg-info
