// Command web is a server on net/http as a Go program writes one: bodies in every framing, trailers, interim
// responses, each with a digest by which the other end can tell whether anything was changed.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net/http"
	"os"
	"strconv"
)

// seeded gives the same bytes for the same seed.
func seeded(length, seed int64) io.Reader {
	return io.LimitReader(rand.New(rand.NewSource(seed)), length)
}

// bytesOf serves n bytes of a seed; with length=1 their number is announced, else they are chunked and their digest
// follows as a trailer.
func bytesOf(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
	if err != nil {
		http.Error(w, "n: "+err.Error(), http.StatusBadRequest)
		return
	}
	if r.FormValue("length") == "1" {
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	} else {
		w.Header().Set("Trailer", "X-Digest")
	}
	digest := sha256.New()
	if _, err := io.Copy(io.MultiWriter(w, digest), seeded(n, n)); err != nil {
		log.Printf("a body of %d bytes was not taken: %v", n, err)
		return
	}
	if r.FormValue("length") != "1" {
		w.Header().Set("X-Digest", hex.EncodeToString(digest.Sum(nil)))
	}
}

// digest answers what came: its digest, length, framing and trailer.
func digest(w http.ResponseWriter, r *http.Request) {
	sum := sha256.New()
	n, err := io.Copy(sum, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "%x %d %d %s\n", sum.Sum(nil), n, r.ContentLength, r.Trailer.Get("X-Digest"))
}

// hinted sends an interim response before the real one.
func hinted(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Link", "</style.css>; rel=preload")
	w.WriteHeader(http.StatusEarlyHints)
	fmt.Fprintln(w, "hinted")
}

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })
	http.HandleFunc("/bytes", bytesOf)
	http.HandleFunc("/digest", digest)
	http.HandleFunc("/hinted", hinted)
	log.Fatal(http.ListenAndServe(":"+os.Args[1], nil))
}
