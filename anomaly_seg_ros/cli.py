# SPDX-License-Identifier: Apache-2.0
"""
The command line ``anomaly-seg``.

The commands themselves are in ``commands``, one small function each. They import what they need
when they run, so that ``--help`` is quick and an extra that is not installed hurts nobody else.
"""

import logging
import os
import signal
import sys

from anomaly_seg_ros import __version__
from anomaly_seg_ros.commands import evaluation, models, runs
from anomaly_seg_ros.commands.options import CONSOLE
from anomaly_seg_ros.errors import UserError
import click
from rich.logging import RichHandler


@click.group(context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 99})
@click.version_option(__version__, prog_name='anomaly-seg')
@click.option('-v', '--verbose', is_flag=True, help='Say more.')
def cli(verbose: bool) -> None:
    """Anomaly segmentation for ROS 2: what in this image the network does not know."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format='%(message)s',
        handlers=[RichHandler(console=CONSOLE, show_path=False, show_time=False)])


for _command in (
        runs.demo, models.export_command, models.build_engine_command, models.calibrate_command,
        models.bench_command, models.fetch_command, models.inspect, runs.doctor_command,
        evaluation.datasets_command, evaluation.evaluate_command, evaluation.metrics_command,
        evaluation.image_ood_command, evaluation.compare_command, evaluation.submit_command,
        runs.make_bag_command, runs.replay_command):
    cli.add_command(_command)


def main() -> None:
    """Run the command line: exit code 0 done, 1 the run failed, 2 wrong usage."""
    # Damaged files get a message of ours; OpenCV's warnings beside it only confuse.
    os.environ.setdefault('OPENCV_LOG_LEVEL', 'ERROR')
    # As Ctrl-C: temporary files are removed, and what is kept is said.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli.main(prog_name='anomaly-seg', standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        # click hides the interrupt, and what a run said of its files, in an Abort.
        kept = ''.join(map(str, (error.__cause__ or error).args))
        CONSOLE.print(f'stopped; what was written until now is kept{kept}', highlight=False,
                      markup=False, soft_wrap=True)
        sys.exit(1)
    except UserError as error:
        CONSOLE.print(f'error: {error}', style='red', highlight=False, markup=False,
                      soft_wrap=True)
        sys.exit(1)
    except OSError as error:  # a file or folder that may not be read, a disk that is full, ...
        said = f'{error.filename}: {error.strerror}' if error.filename else error
        logging.getLogger(__name__).info('', exc_info=error)
        CONSOLE.print(f'error: {said}', style='red', highlight=False, markup=False,
                      soft_wrap=True)
        sys.exit(1)


if __name__ == '__main__':
    main()
