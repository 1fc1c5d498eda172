/*
 * In place of the module socksv5, whose server socks-proxy-agent's tests start: as much of it as they use.
 *
 * The server is this package's, in a process of its own, which ends when its standard input does, and fails if it has
 * not been used.
 */

const { spawn } = require('child_process');
const { EventEmitter } = require('events');

const PROGRAM = `
import sys
from socks5srv.testing import start

with start() as proxy:
    print(proxy.port, flush=True)
    sys.stdin.read()
    proxy.assert_used(host="127.0.0.1", times=2)
`;

class Server extends EventEmitter {
    useAuth() {}

    listen(port, host, listening) {
        this.process = spawn('python', ['-c', PROGRAM], { stdio: ['pipe', 'pipe', 'inherit'] });
        this.process.stdout.once('data', (line) => {
            this.port = Number(line);
            listening();
        });
        this.process.once('exit', (code) => this.emit(code ? 'error' : 'close', new Error(`exit code ${code}`)));
    }

    address() {
        return { port: this.port };
    }

    close() {
        this.process.stdin.end();
    }
}

exports.createServer = () => new Server();
exports.auth = { None() {} };
