// S3 and Threat Stack in one, for bench.py: `node bench.js PORT MILLISECONDS`. It counts the details that are put, and
// says how many there were to GET /archived.
const [port, delay] = process.argv.slice(2).map(Number), filler = "x".repeat(1000);
let archived = 0;
require("http").createServer({keepAliveTimeout: 0}, (request, response) => request.resume().on("end", () => {
  const id = request.url.split("/").pop();
  const answer = () => {
    if (request.method == "GET") return response.end(JSON.stringify({id, filler}));
    archived += request.url.includes("/alerts/");
    response.setHeader("ETag", '"0"').end();
  };
  if (id == "archived") response.end(String(archived));
  else if (delay) setTimeout(answer, delay);
  else answer();
})).listen(port, "127.0.0.1");
