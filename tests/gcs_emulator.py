"""A bucket on this machine: an emulator of Google Cloud Storage, to which generations and conditions on them are added.

The emulator takes one request at a time: nothing comes between a condition and the write that depends on it.
"""
import contextlib
import http.server
import io
import json
import logging
import re
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

BUCKET = 'bucket'
http.server.HTTPServer.request_queue_size = 128  # of 5, most connections of a checkpoint would wait for a second attempt
logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)  # it logs each object that is asked for in vain


@contextlib.contextmanager
def serving():
  """Yields the environment of processes that use the emulator, which has one empty bucket."""
  original = server.Router, server.Response
  server.Router, server.Response = _Router, _Response
  emulator = server.create_server('localhost', 0, in_memory=True, default_bucket=BUCKET)
  emulator.start()
  address = f'http://localhost:{emulator._api._httpd.server_port}'
  try:
    # gcsfs would otherwise ask another service, which the emulator lacks, what kind of bucket it is.
    yield dict(STORAGE_EMULATOR_HOST=address, TENSORSTORE_GCS_HTTP_URL=address, GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false')
  finally:
    emulator.stop()
    server.Router, server.Response = original


class _Router(server.Router):
  """Refuses requests whose `ifGenerationMatch` is not the generation of the object."""

  def handle(self, method):
    request = self._request_handler
    query = parse_qs(urlparse(request.path).query)
    if 'ifGenerationMatch' in query:
      body = request.rfile.read(int(request.headers.get('Content-Length') or 0))
      request.rfile = io.BytesIO(body)
      name = query.get('name', [''])[0]
      if method == 'POST' and not name:  # in the first part of the body
        name = json.loads(body[body.index(b'{'):body.index(b'}') + 1])['name']
      if int(query['ifGenerationMatch'][0]) != _generation(request, name):
        response = _Response(request)
        response.status = HTTPStatus.PRECONDITION_FAILED
        response.json({'error': {'code': 412, 'message': 'conditionNotMet'}})
        response.close()
        return
    super().handle(method)


class _Response(server.Response):
  """Tells the generation of an object that is read."""

  def close(self):
    if self._handler.command == 'GET':
      self['X-Goog-Generation'] = str(_generation(self._handler))
    super().close()


def _generation(request, name=''):
  """Of the object that the path of a request names, or of `name` in its bucket; 0 if there is none."""
  bucket, in_path = re.search('/b/([^/]*)(?:/o/?)?(.*)', urlparse(request.path).path).groups()
  try:
    return int(request.storage.get_file_obj(bucket, name or unquote(in_path))['generation'])
  except NotFound:
    return 0
