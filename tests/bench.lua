-- wrk's script for bench.py: webhooks of `batch` alerts, in whose ids `stamp` is what no other load has.
local threads = 0
function setup(thread) threads = threads + 1; thread:set("number", threads) end
function init(arguments) stamp, batch, alert, sent = arguments[1], tonumber(arguments[2]), arguments[3], 0 end
function request()
  local alerts = {}
  for i = 1, batch do
    sent = sent + 1
    alerts[i] = string.format(alert, string.format("%s-%d-%d", stamp, number, sent))
  end
  return wrk.format("POST", nil, nil, '{"alerts":[' .. table.concat(alerts, ",") .. ']}')
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('[%f, %f, %d]\n', summary.requests / summary.duration * 1e6, latency:percentile(99.9) / 1e3,
    e.status + e.connect + e.read + e.write + e.timeout))
end
