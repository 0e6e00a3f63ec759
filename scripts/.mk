set -eu
. "$(dirname "$0")/_venv"
cd "$root"
environment .venv-check 3.11 requirements.lock tests/requirements-test.lock tests/requirements-check.lock bench/requirements-bench.lock
install_project
environment .venv 3.13 requirements.lock requirements-terminal.lock tests/requirements-test.lock
install_model
install_project
bench_environment 3.13
environment .venv-openai-legacy 3.13 tests/requirements-openai-legacy.lock
environment .venv-3.11 3.11 requirements.lock requirements-terminal.lock tests/requirements-test.lock
install_model
install_project
