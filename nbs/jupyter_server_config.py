"""JupyterLab as `make lab` starts it: kernels of pipeline notebooks work where `dvc repro` runs them, at the root of
the repository."""

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager


class PipelineAtRoot(AsyncMappingKernelManager):
    def cwd_for_path(self, path, **kwargs):
        return super().cwd_for_path("" if path.startswith(("nbs/pipeline", "reports/notebooks")) else path, **kwargs)


c = get_config()  # noqa: F821, Jupyter defines it
c.ServerApp.kernel_manager_class = PipelineAtRoot
