#!/usr/bin/perl
# The server of the third engine (tests/thirdengine.py), for an image that has Perl, as every Debian
# has. It takes the options that it lists and no others, reads its model into memory, and answers
# every prompt with the same words, as many as are asked for.
use strict;
use warnings;
use IO::Socket::INET;

my @known = (
    'weights <FILE>', 'public-name <NAME>', 'bind <ADDRESS>', 'listen <PORT>', 'window <N>',
    'lanes <N>', 'workers <N>', 'cache-format <TYPE>', 'device <PLACE>', 'gpu-budget <MIB>',
);
my @words = qw(amber copper garnet indigo jade lilac ochre pearl ruby silver teal violet);
my $began = time;

sub report { printf STDERR "[stub %.1fs] %s\n", time - $began, $_[0] }
sub quit { report($_[0]); exit 2 }

if ("@ARGV" eq '--version') { print "stub 7.1\n"; exit }
if ("@ARGV" eq '--options') { print map({ "--$_\n" } @known); exit }

my %option;
while (@ARGV) {
    my $name = shift;
    grep { $name eq '--' . (split)[0] } @known or quit("no option $name");
    $option{substr $name, 2} = shift;
}
report('stub 7.1');
report('reading weights');
open(my $file, '<:raw', $option{weights}) or quit("cannot read $option{weights}: $!");
my $weights = do { local $/; <$file> };
close $file;
report('weights use ' . length($weights) . ' bytes');
if ($option{device} eq 'gpu') {
    -r '/opt/libcuda.so' or quit('no GPU here');
    open(my $kept, '>', "$ENV{STUB_CACHE}/compiled") or quit("cannot write to the cache: $!");
    close $kept;
}
report("computing on $option{device}");
quit('cache of 512 tokens cannot hold a window') if -e '/small-cache' && $option{window} > 512;

my ($name, $done, $busy_s) = ($option{'public-name'}, 0, 0);
my $listener = IO::Socket::INET->new(
    LocalAddr => $option{bind}, LocalPort => $option{listen}, Listen => 64, ReuseAddr => 1,
) or quit("cannot listen: $!");
$SIG{TERM} = $SIG{INT} = sub { exit 0 };
$SIG{PIPE} = 'IGNORE';
report("ready on $option{bind}:$option{listen}");
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
    if ($path eq '/livez') { answer($client, 'text/plain', '') }
    elsif ($path eq '/about') {
        json($client, qq({"window": $option{window}, "lanes": $option{lanes}}));
    }
    elsif ($path eq '/v1/models') {
        json($client, qq({"object": "list", "data": [{"id": "$name", "object": "model"}]}));
    }
    elsif ($path eq '/metrics') {
        answer($client, 'text/plain', "stub_running 0\nstub_waiting 0\nstub_cache_share 0.01\n" .
            "stub_text_tokens $done\nstub_text_seconds $busy_s\n");
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
    my ($text, $finish) = (join(' ', map { $words[$_ % @words] } 0 .. $tokens - 1), 'length');
    if (defined $stop && (my $end = index $text, $stop) >= 0) {
        ($text, $finish) = (substr($text, 0, $end), 'stop');
        $tokens = split ' ', $text;
    }
    $done += $tokens;
    $busy_s += $tokens / 2;
    report('speed: prompt 0.0/s, text 2.0/s, 1 running, 0 waiting, cache 1.0%');
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
