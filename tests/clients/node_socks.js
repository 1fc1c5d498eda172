// The `socks` package of node: CONNECT, BIND and UDP ASSOCIATE.
//
//     node node_socks.js connect|bind|associate PROXY_HOST PROXY_PORT HOST PORT TEXT [USER PASSWORD]
//
// connect and associate send TEXT and print what comes back.  bind prints the port where the
// proxy listens, sends TEXT to whoever calls, and prints what they say.

const { SocksClient } = require("socks");
const dgram = require("dgram");

const [command, proxyHost, proxyPort, host, port, text, userId, password] = process.argv.slice(2);

const options = {
  proxy: { host: proxyHost, port: Number(proxyPort), type: 5, userId, password },
  command,
  // For UDP it is where we send from, which we do not know.
  destination: command === "associate" ? { host: "0.0.0.0", port: 0 } : { host, port: Number(port) },
};

function fail(error) {
  console.error(String(error));
  process.exit(1);
}

function talk(socket) {
  socket.on("error", fail);
  socket.pipe(process.stdout);
  socket.end(text);
}

if (command === "connect") {
  SocksClient.createConnection(options).then(({ socket }) => talk(socket), fail);
} else {
  const client = new SocksClient(options);
  client.on("error", fail);
  client.on("bound", ({ remoteHost }) => console.log(remoteHost.port));
  client.on("established", ({ socket, remoteHost }) => {
    if (command === "bind") {
      talk(socket);
      socket.resume();
      return;
    }
    const udp = dgram.createSocket(remoteHost.host.includes(":") ? "udp6" : "udp4");
    udp.on("error", fail);
    udp.on("message", (datagram) => {
      const frame = SocksClient.parseUDPFrame(datagram);
      console.log(JSON.stringify({ from: frame.remoteHost, data: frame.data.toString() }));
      udp.close();
      socket.destroy();
    });
    const frame = SocksClient.createUDPFrame({ remoteHost: { host, port: Number(port) }, data: Buffer.from(text) });
    udp.send(frame, remoteHost.port, remoteHost.host);
  });
  client.connect();
}
