// Command torture is HTTP/2 and gRPC of Go at both ends of the torture tests, beside meshwork-app for HTTP/1 and TCP:
// `torture serve` answers, every other task calls. What a caller finds out is a line of its output each; what must not
// be makes it end with 1.
package main

import (
	"flag"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	// stuck is how long anything that should go on may stand still on a busy machine.
	stuck = 60 * time.Second
	// lookEvery is the time between two looks for a file: how a test tells a running task to go on.
	lookEvery = 20 * time.Millisecond
)

// protocol is one way to call the same server.
type protocol struct {
	name string
	dial func(to string) (connection, error)
	to   string
}

func (p protocol) connect() (connection, error) { return p.dial(p.to) }

// options of all tasks.
type options struct {
	protocols                                       []protocol
	bytes, seed                                     int64
	times, connections, streams, requests, parallel int
	until                                           string
}

var tasks = map[string]func(options) error{
	"bodies": bodies, "endless": endless, "resets": resets, "slow": slow, "crowd": crowd, "churn": churn, "fair": fair,
	"mixed": mixed,
}

var saying sync.Mutex

// say writes a line of the result at once: a test may wait for it.
func say(format string, values ...any) {
	saying.Lock()
	defer saying.Unlock()
	fmt.Printf(format+"\n", values...)
}

// appears returns when a test has made the file.
func appears(file string) {
	for {
		if _, err := os.Stat(file); err == nil {
			return
		}
		time.Sleep(lookEvery)
	}
}

func run(words []string) error {
	if len(words) == 0 {
		return fmt.Errorf("usage: torture serve|TASK --http2 TO --grpc TO [options]")
	}
	var o options
	flags := flag.NewFlagSet(words[0], flag.ContinueOnError)
	http2 := flags.String("http2", "", "address of HTTP/2, for serve a port")
	grpc := flags.String("grpc", "", "address of gRPC, for serve a port")
	flags.Int64Var(&o.bytes, "bytes", 0, "size of a body")
	flags.Int64Var(&o.seed, "seed", 1, "of what is drawn")
	flags.IntVar(&o.times, "times", 0, "exchanges in all")
	flags.IntVar(&o.connections, "connections", 1, "of each protocol")
	flags.IntVar(&o.streams, "streams", 1, "at once on each connection")
	flags.IntVar(&o.requests, "requests", 1, "on each stream, one after the other")
	flags.IntVar(&o.parallel, "parallel", 1, "connections at once")
	flags.StringVar(&o.until, "until", "", "a file that ends it or lets it go on")
	if err := flags.Parse(words[1:]); err != nil {
		return err
	}
	if words[0] == "serve" {
		ended := make(chan error)
		go func() { ended <- serveHTTP2(*http2) }()
		go func() { ended <- serveGRPC(*grpc) }()
		return <-ended
	}
	for _, p := range []protocol{{"http2", dialHTTP2, *http2}, {"grpc", dialGRPC, *grpc}} {
		if p.to != "" {
			o.protocols = append(o.protocols, p)
		}
	}
	task, found := tasks[words[0]]
	if !found {
		return fmt.Errorf("no task %q", words[0])
	}
	return task(o)
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		say("failed: %v", err)
		os.Exit(1)
	}
}
