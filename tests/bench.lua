-- wrk's script for bench.py. Arguments: STAMP BATCH ALERT MILLISECONDS. It sends webhooks of BATCH alerts with ids that
-- begin with STAMP, or GET requests if BATCH is 0. Each connection pauses for MILLISECONDS on average before a request.
local threads = 0
function setup(thread) threads = threads + 1; thread:set("number", threads) end
function init(arguments)
  stamp, batch, alert, sent = arguments[1], tonumber(arguments[2]), arguments[3], 0
  local pause = tonumber(arguments[4])
  -- Pauses of random length: clients that ask at the same moment would measure the burst.
  if pause > 0 then delay = function() return math.random(0, 2 * pause) end end
end
function request()
  if batch == 0 then return wrk.format("GET") end
  local alerts = {}
  for i = 1, batch do
    sent = sent + 1
    alerts[i] = string.format(alert, string.format("%s-%d-%d", stamp, number, sent))
  end
  return wrk.format("POST", nil, nil, '{"alerts":[' .. table.concat(alerts, ",") .. ']}')
end
function done(summary, latency)
  local e, answered = summary.errors, summary.requests > 0
  -- Without any answer, the time that an answer takes is longer than the whole load.
  local function milliseconds(percent) return (answered and latency:percentile(percent) or summary.duration) / 1e3 end
  io.write(string.format('[%f, %f, %f, %d]\n', summary.requests / summary.duration * 1e6, milliseconds(50),
    milliseconds(99.9), e.status + e.connect + e.read + e.write + e.timeout))
end
