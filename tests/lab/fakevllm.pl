#!/usr/bin/perl
# Stands for vLLM where no GPU is: "vllm" of an image that has Perl, as every Debian has.
# It takes the options that its help names and no others, insists on its model and its cache, and
# answers every prompt with the same words, as many as are asked for.
use strict;
use warnings;
use IO::Socket::INET;

my $help = do { local $/; <DATA> };
my @words = qw(amber copper garnet indigo jade lilac ochre pearl ruby silver teal violet);

sub quit { print STDERR "vllm: error: $_[0]\n"; exit 2 }

if ("@ARGV" eq '--version') { print "0.32.0\n"; exit }
quit('invalid choice') unless @ARGV && shift eq 'serve';
if ("@ARGV" eq '--help=all') { print $help; exit }

my $model = shift;
my %option;
while (@ARGV) {
    my $name = shift;
    $help =~ /^  (?:.*, )?\Q$name\E(?=[ ,\n])(.*)/m or quit("unrecognized arguments: $name");
    $option{$name} = $1 =~ /^ [A-Z{]/ ? shift : 1;
}
-r "$model/config.json" or quit("no model in $model");
my $cache = $ENV{VLLM_CACHE_ROOT};
mkdir $cache;
open(my $kept, '>', "$cache/compiled") or quit("cannot write to $cache: $!");
close $kept;

my $name = $option{'--served-model-name'};
my $done = 0;
my $listener = IO::Socket::INET->new(
    LocalAddr => $option{'--host'}, LocalPort => $option{'--port'}, Listen => 64, ReuseAddr => 1,
) or quit("cannot listen: $!");
$SIG{TERM} = $SIG{INT} = sub { exit 0 };
$SIG{PIPE} = 'IGNORE';
print STDERR "INFO 11-25 07:00:00 [api_server.py:1] Application startup complete.\n";
while (1) {
    my $client = $listener->accept or next;
    serve($client);
    close $client;
}

sub serve {
    my ($client) = @_;
    my ($method, $path) = split ' ', (<$client> // return);
    my $length = 0;
    while (my $line = <$client>) {
        last if $line =~ /^\r?\n$/;
        $length = $1 if $line =~ /^content-length: *(\d+)/i;
    }
    read $client, my $body = '', $length;
    if ($path eq '/health') { answer($client, 'text/plain', '') }
    elsif ($path eq '/version') { json($client, '{"version": "0.32.0"}') }
    elsif ($path eq '/v1/models') {
        json($client, qq({"object": "list", "data": [{"id": "$name", "object": "model", ) .
            qq("max_model_len": $option{'--max-model-len'}}]}));
    }
    elsif ($path eq '/metrics') {
        my $label = qq({engine="0",model_name="$name"});
        answer($client, 'text/plain', "vllm:num_requests_running$label 0.0\n" .
            "vllm:num_requests_waiting$label 0.0\nvllm:generation_tokens_total$label $done.0\n");
    }
    elsif ($method eq 'POST' && $path =~ m{^/v1/(chat/)?completions$}) {
        complete($client, $body, defined $1);
    }
    else { answer($client, 'text/plain', 'Not Found', '404 Not Found') }
}

sub complete {
    my ($client, $body, $chat) = @_;
    my $tokens = $body =~ /"max_(?:completion_)?tokens": *(\d+)/ ? $1 : 16;
    my ($stop) = $body =~ /"stop": *\[? *"([^"]+)"/;
    # Kernels that compute wrongly answer like this: an image may have them (/broken-kernels).
    my $wrong = -e '/broken-kernels' && ($option{'--linear-backend'} // '') ne 'marlin';
    my ($text, $finish) = (join(' ', map { $wrong ? '!!!!' : $words[$_ % @words] } 0 .. $tokens - 1), 'length');
    if (defined $stop && (my $end = index $text, $stop) >= 0) {
        ($text, $finish) = (substr($text, 0, $end), 'stop');
        $tokens = split ' ', $text;
    }
    $done += $tokens;
    my $usage = qq("usage": {"prompt_tokens": 4, "completion_tokens": $tokens});
    my $end = qq("index": 0, "finish_reason": "$finish");
    my $said = $chat ? qq("message": {"role": "assistant", "content": "$text"}) : qq("text": "$text");
    if ($body !~ /"stream": *true/) {
        return json($client, qq({"model": "$name", "choices": [{$said, $end}], $usage}));
    }
    my $events = '';
    for my $piece ($text =~ /\S+ ?/g) {
        my $part = $chat ? qq("delta": {"content": "$piece"}) : qq("text": "$piece");
        $events .= qq(data: {"choices": [{"index": 0, $part, "finish_reason": null}]}\n\n);
    }
    my $last = $chat ? '"delta": {}' : '"text": ""';
    $events .= qq(data: {"choices": [{$last, $end}]}\n\n);
    $events .= qq(data: {"choices": [], $usage}\n\n) if $body =~ /"include_usage": *true/;
    answer($client, 'text/event-stream', "${events}data: [DONE]\n\n");
}

sub json { answer($_[0], 'application/json', $_[1]) }

sub answer {
    my ($client, $type, $text, $status) = @_;
    print $client 'HTTP/1.1 ', $status // '200 OK', "\r\nContent-Type: $type\r\n",
        'Content-Length: ', length $text, "\r\nConnection: close\r\n\r\n", $text;
}

__DATA__
usage: vllm serve [model_tag] [options]

options:
  -h, --help            show this help message and exit

Frontend:
  --host HOST           Host name. (default: None)
  --port PORT           Port number. (default: 8000)

ModelConfig:
  --generation-config GENERATION_CONFIG
                        The folder path to the generation config.
  --max-model-len MAX_MODEL_LEN
                        Model context length (prompt and output).
  --quantization QUANTIZATION, -q QUANTIZATION
                        Method used to quantize the weights.
  --served-model-name SERVED_MODEL_NAME [SERVED_MODEL_NAME ...]
                        The model name(s) used in the API.
  --trust-remote-code, --no-trust-remote-code
                        Trust remote code. (default: False)

KernelConfig:
  --linear-backend {auto,cutlass,marlin,flashinfer_cutlass}
                        Kernel of linear layers. (default: auto)
  --moe-backend {auto,cutlass,marlin,triton}
                        Kernel of experts. (default: auto)

ParallelConfig:
  --tensor-parallel-size TENSOR_PARALLEL_SIZE, -tp TENSOR_PARALLEL_SIZE
                        Number of tensor parallel groups. (default: 1)

CacheConfig:
  --enable-prefix-caching, --no-enable-prefix-caching
                        Whether to enable prefix caching.
  --enable-prompt-tokens-details, --no-enable-prompt-tokens-details
                        Whether usage tells the details of prompt tokens.
  --gpu-memory-utilization GPU_MEMORY_UTILIZATION
                        The fraction of GPU memory to be used. (default: 0.92)
  --kv-cache-dtype {auto,bfloat16,fp8,fp8_e4m3,fp8_e5m2,nvfp4}
                        Data type for kv cache storage. (default: auto)
  --kv-cache-memory-bytes KV_CACHE_MEMORY_BYTES
                        Size of KV Cache per GPU in bytes. (default: None)

SchedulerConfig:
  --max-num-batched-tokens MAX_NUM_BATCHED_TOKENS
                        Maximum number of tokens in a single iteration.
  --max-num-seqs MAX_NUM_SEQS
                        Maximum number of sequences in a single iteration.

VllmConfig:
  --performance-mode {balanced,interactivity,throughput}
                        Performance mode for runtime behavior.
