"""The gateway: an OpenAI-compatible server that asks a draft first and sends on what the target is needed for.

`settings` what can be set; `schema` what a request and an error are; `limits` what is let in; `upstreams` how a server
is called; `local` how a model of this process is; `peek` and `raters` how a rating is read; `decide` who answers;
`chat` one request from first to last byte; `gateway` the application; `book` what is remembered; `run` the process.
"""

from importlib.util import find_spec

from mmroute.errors import MissingExtra

_NEEDS = {"starlette": "starlette", "uvicorn": "uvicorn", "httpx2": "httpx2"}
_NEEDS |= {"prometheus_client": "prometheus-client", "pydantic_settings": "pydantic-settings"}

for _module, _package in _NEEDS.items():
    if find_spec(_module) is None:
        raise MissingExtra("serve", _package, "serve")
