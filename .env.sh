export PYTHONPATH=/work/wt/lead6/.typing
export PATH=/work/main/.venv/bin:$PATH
cd /work/wt/lead6
